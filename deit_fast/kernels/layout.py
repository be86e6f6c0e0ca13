"""How launchers see their tensors: as rows whose elements lie side by side."""

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., D] as [rows, D] with unit stride along D; a view where its strides allow, else a copy."""
    width = x.shape[-1]
    rows = x.reshape(x.numel() // width if width else 0, width)
    return rows if width <= 1 or rows.stride(1) == 1 else rows.contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """`x` with its last dimension side by side; a copy only where it isn't."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
