"""Whether float32 may be multiplied in TF32, in whichever of PyTorch's ways that was said.

There are `torch.backends.cuda.matmul.allow_tf32`, `torch.set_float32_matmul_precision`, and `fp32_precision` of
`torch.backends`, `torch.backends.cudnn` and `torch.backends.cuda.matmul`. The first two can't be read once a program
has set one of the others: that raises.
"""

from functools import partial

import torch

# What PyTorch sets cuBLAS by: "tf32", or another word for float32 as it is.
matmul_precision = partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")


def is_allowed() -> bool:
    """Whether stock PyTorch multiplies float32 matrices in TF32, on a GPU that has it."""
    return matmul_precision() == "tf32"


def forbid_in_convolutions() -> None:
    """Stock convolutions of float32 multiply float32, which on a GPU they don't unless told so."""
    # Alone, the first leaves them to torch.backends.fp32_precision, and the others make its getter raise.
    torch.backends.cudnn.allow_tf32 = False
    for kind in ("conv", "rnn"):
        torch._C._set_fp32_precision_setter("cuda", kind, "ieee")
