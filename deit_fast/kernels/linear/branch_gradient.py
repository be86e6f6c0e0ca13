"""The gradient that a branch's backward products read: packed, scaled by drop path, in the products' dtype."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import full_row
from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import as_rows, dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.linear import settings


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described("branch_gradient_kernel", lambda a: (a["rows"], a["width"]), ("drop_path_scale_ptr", "kept_ptr")),
)
def branch_gradient_kernel(
    grad_ptr,  # [rows, width], with kept of all samples
    drop_path_scale_ptr,  # [B] or None
    kept_ptr,  # [1 + B] or None
    y_ptr,  # [rows, width]
    rows,
    tokens,
    width,
    grad_stride,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """`y = drop_path_scale * grad`, of the kept samples' rows alone where there is `kept_ptr`.

    A pass of its own, so that no product looks up an index or a scale for each element it loads.
    """
    column_tiles = tl.cdiv(width, COLUMN_BLOCK)
    first = tl.program_id(0) // column_tiles * ROW_BLOCK
    if kept_ptr is not None:
        rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if first >= rows:
            return
    row = first + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = row_mask[:, None] & (column < width)[None, :]
    grad_row = row
    if kept_ptr is not None:
        grad_row = full_row(kept_ptr, row, row_mask, tokens)
    grad = tl.load(grad_ptr + grad_row.to(tl.int64)[:, None] * grad_stride + column[None, :], mask=mask, other=0.0)
    if drop_path_scale_ptr is not None:
        scale = tl.load(drop_path_scale_ptr + grad_row // tokens, mask=row_mask, other=0.0)
        grad = grad.to(tl.float32) * scale.to(tl.float32)[:, None]
    tl.store(y_ptr + row.to(tl.int64)[:, None] * width + column[None, :], grad.to(y_ptr.dtype.element_ty), mask=mask)


def branch_gradient(
    grad: Tensor, drop_path_scale: Tensor | None, kept: Tensor | None, capacity: int, dtype: torch.dtype
) -> Tensor:
    """`drop_path_scale * grad` in `dtype`: grad [B, ..., N] itself where that is what it is.

    With `kept` (see `drop_path.keep_samples`) the result is packed, [capacity, ..., N].
    """
    if drop_path_scale is None and kept is None and grad.dtype is dtype:
        return grad
    shape = grad.shape if kept is None else (capacity, *grad.shape[1:])
    y = torch.empty(shape, dtype=dtype, device=grad.device)
    if not y.numel():
        return y
    width = grad.shape[-1]
    tokens = grad.numel() // (grad.shape[0] * width) if grad.ndim > 1 else 1
    rows = y.numel() // width
    grad = as_rows(grad)
    tile = settings.ELEMENTWISE
    run.run(
        branch_gradient_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(width, tile.columns),
        grad.device,
        grad,
        dense(drop_path_scale),
        kept,
        y,
        rows,
        tokens,
        width,
        grad.stride(0),
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return y
