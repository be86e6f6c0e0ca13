"""In which dtype the CPU path multiplies matrices."""

from functools import cache

import torch
from torch import Tensor


def product_dtype(weight: Tensor) -> torch.dtype:
    """float32 for 16-bit weights on a processor without 16-bit instructions, else the weight's own dtype.

    Without them torch multiplies 16-bit matrices in scalar loops, many times slower than it does float32 ones.
    Widening is exact, and the result is rounded once, as theirs is.
    """
    if weight.dtype.itemsize == 2 and weight.device.type == "cpu" and not _has_instructions(weight.dtype):
        return torch.float32
    return weight.dtype


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    # Asked of x86 alone, where torch's answer says which loops will run.
    if torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2", "AVX512"):
        return True
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()
