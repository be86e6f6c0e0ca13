"""LayerNorm over rows: with the residual added on the way in where there is one, or of kept samples alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import full_row, normalise, tile_statistics
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import as_rows, dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.layer_norm import settings

_MAX_WIDTH = 8192


_FUSED = ("residual_ptr", "weight_ptr", "bias_ptr", "kept_ptr")


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described("layer_norm_kernel", lambda a: (a["rows"], a["WIDTH"]), _FUSED),
)
def layer_norm_kernel(
    x_ptr,  # [rows, WIDTH]
    residual_ptr,  # [rows, WIDTH] or None
    weight_ptr,  # [WIDTH] or None
    bias_ptr,  # [WIDTH] or None
    kept_ptr,  # [1 + B] or None
    sum_ptr,  # [rows, WIDTH] with a residual, else None
    y_ptr,  # [rows, WIDTH]
    rows,
    tokens,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`y = (z - mean(z)) / sqrt(var(z) + eps) * weight + bias` with z = x, or z = sum = x + residual; var is biased.

    Ba et al. 2016, equation 4. HEAD + TAIL are a row's width in two tiles.

    With `kept_ptr`, rows are those of kept samples: x is full and y packed.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    x_row = row
    if kept_ptr is not None:
        kept_rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if tl.program_id(0) * ROWS >= kept_rows:
            return
        row_mask = row < kept_rows
        x_row = full_row(kept_ptr, row, row_mask, tokens).to(tl.int64)
    head = tl.arange(0, HEAD)
    head_mask = head < WIDTH
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    tail_mask = tail < WIDTH
    x_head = _load_sum(x_ptr, residual_ptr, sum_ptr, x_row, row_mask, head, x_stride, residual_stride, WIDTH)
    x_tail = x_head
    if TAIL > 0:
        x_tail = _load_sum(x_ptr, residual_ptr, sum_ptr, x_row, row_mask, tail, x_stride, residual_stride, WIDTH)
    mean, rstd = tile_statistics(x_head, x_tail, head_mask, tail_mask, eps, WIDTH, TAIL)

    y = normalise(x_head, mean, rstd, weight_ptr, bias_ptr, head, head_mask)
    tl.store(
        y_ptr + row[:, None] * WIDTH + head[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & head_mask[None, :],
    )
    if TAIL > 0:
        y = normalise(x_tail, mean, rstd, weight_ptr, bias_ptr, tail, tail_mask)
        tl.store(
            y_ptr + row[:, None] * WIDTH + tail[None, :],
            y.to(y_ptr.dtype.element_ty),
            mask=row_mask[:, None] & tail_mask[None, :],
        )


@triton.jit
def _load_sum(x_ptr, residual_ptr, sum_ptr, row, row_mask, columns, x_stride, residual_stride, WIDTH: tl.constexpr):
    """A float32 tile of x, or of x + residual, which it also writes; the sum is normalised as it was rounded."""
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + row[:, None] * residual_stride + columns[None, :], mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row[:, None] * WIDTH + columns[None, :], total, mask=mask)
        x = total.to(tl.float32)
    return x


def unsupported(width: int) -> str | None:
    return f"rows of {width} do not fit on chip (at most {_MAX_WIDTH})" if width > _MAX_WIDTH else None


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """x [..., D], of any strides, normalised along D: like x, in `dtype` or else x's. weight, bias: [D].

    With `kept` (see `drop_path.keep_samples`) only x's kept samples, packed: [capacity or else B, ..., D].
    """
    shape = x.shape if kept is None or capacity is None else (capacity, *x.shape[1:])
    y = torch.empty(shape, dtype=dtype or x.dtype, device=x.device)
    _launch(x, None, weight, bias, None, y, eps, kept)
    return y


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, both [..., D], and that normalised along D; in the dtype that the two promote to."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty(x.shape, dtype=dtype, device=x.device)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _launch(x, residual, weight, bias, total, y, eps)
    return total, y


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    total: Tensor | None,
    y: Tensor,
    eps: float,
    kept: Tensor | None = None,
) -> None:
    if y.numel() == 0:
        return
    width = x.shape[-1]
    rows = y.numel() // width
    tokens = rows // y.shape[0] if kept is not None else 1
    x = as_rows(x)
    residual = None if residual is None else as_rows(residual)
    itemsizes = tuple(dict.fromkeys((x.element_size(), y.element_size())))
    block, warps = settings.layer_norm_rows(width, itemsizes, hardware.architecture(x))
    head, tail = tiles.cover(width)
    run.run(
        layer_norm_kernel,
        triton.cdiv(rows, block),
        x.device,
        x,
        residual,
        dense(weight),
        dense(bias),
        kept,
        total,
        y,
        rows,
        tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        WIDTH=width,
        HEAD=head,
        TAIL=tail,
        ROWS=block,
        num_warps=warps,
    )
