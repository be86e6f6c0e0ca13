"""How many floating-point operations operators compute, for `torch.utils.flop_counter.FlopCounterMode`.

As torch counts them: two for each multiply-add of a matrix product, nothing else, and a backward's recomputation
counts. Samples that drop path dropped are not computed and not counted: the counter reads how many were kept, which
stops a GPU, and only while it counts.
"""

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def samples_computed(x: Tensor, kept: Tensor | None = None) -> int:
    """For how many samples an operator computes; all of them where the tensors hold no values."""
    if kept is None:
        return x.shape[0]
    return kept.shape[0] - 1 if isinstance(kept, FakeTensor) or kept.is_meta else int(kept[0])


def rows_computed(x: Tensor, kept: Tensor | None = None) -> int:
    """For how many rows of x [B, ..., K]."""
    return x[0].numel() // x.shape[-1] * samples_computed(x, kept) if x.numel() else 0


def product_flops(rows: int, weight: Tensor) -> int:
    """Of so many rows with a weight, or a part of one."""
    return 2 * rows * weight.numel()
