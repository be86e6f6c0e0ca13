"""How launchers see their tensors: as rows whose elements lie side by side."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., D] as [rows, D] with unit stride along D; a view where its strides allow, else a copy."""
    width = x.shape[-1]
    rows = x.reshape(x.numel() // width if width else 0, width)
    return rows if width <= 1 or rows.stride(1) == 1 else rows.contiguous()


def one_stride(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each [..., D] as [rows, D] of one stride: kernels that take several tensors of a shape take one for all."""
    tensors = tuple(as_rows(t) for t in tensors)
    return tensors if len({t.stride(0) for t in tensors}) == 1 else tuple(t.contiguous() for t in tensors)


def all_or_none(biases: Sequence[Tensor | None], weight: Tensor) -> tuple[Tensor | None, ...]:
    """Kernels take the biases of q, k and v, [N], all or none, and of one dtype; BEiT-like models lack the key's."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return tuple(biases)
    dtype = given[0].dtype
    for bias in given[1:]:
        dtype = torch.promote_types(dtype, bias.dtype)
    return tuple(weight.new_zeros(weight.shape[0], dtype=dtype) if b is None else b.to(dtype) for b in biases)


def unit_stride(x: Tensor) -> Tensor:
    """`x` with its last dimension side by side; a copy only where it isn't."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    """`x`, of any shape, contiguous; a copy only where it isn't."""
    return None if x is None else x.contiguous()
