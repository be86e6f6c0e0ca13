"""LayerNorm backward: the input's gradient row by row, the parameters' by a fixed tree over the rows."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import full_row, sum_rows, tile_statistics
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import as_rows, dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.layer_norm import settings


@triton.jit(
    **described(
        "layer_norm_backward_kernel",
        lambda a: (a["rows"], a["WIDTH"]),
        ("grad_ptr", "weight_ptr", "residual_grad_ptr", "normalised_ptr", "kept_ptr"),
    )
)
def layer_norm_backward_kernel(
    grad_ptr,  # [rows, WIDTH] or None
    x_ptr,  # [rows, WIDTH]
    weight_ptr,  # [WIDTH] or None
    residual_grad_ptr,  # [rows, WIDTH] or None
    kept_ptr,  # [1 + B] or None
    dx_ptr,  # [rows, WIDTH] or None
    normalised_ptr,  # [rows, WIDTH] or None
    mean_ptr,  # [rows], float32, or None
    rstd_ptr,  # [rows], float32, or None
    rows,
    tokens,
    grad_stride,
    x_stride,
    residual_grad_stride,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`dx = rstd * (g - mean(g) - x̂ * mean(g * x̂)) + residual_grad` with g = weight * grad; normalised = x̂.

    The derivative of Ba et al. 2016, equation 4, as in Triton's tutorial on LayerNorm. What x̂, or mean and rstd, are
    multiplied with is a parameter's gradient.

    Without `grad_ptr`, no dx. With `kept_ptr`, rows are those of kept samples: grad and x̂ are packed, the others full;
    past them come the dropped samples' rows, where dx is `residual_grad` or 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = row < rows
    head = tl.arange(0, HEAD)
    head_mask = head < WIDTH
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    tail_mask = tail < WIDTH
    full = row
    is_kept = row_mask
    if kept_ptr is not None:
        full = full_row(kept_ptr, row, row_mask, tokens).to(tl.int64)
        is_kept = row < tl.load(kept_ptr) * tokens
    x_rows = x_ptr + full[:, None] * x_stride
    x_head = _load_tile(x_rows, is_kept, head, head_mask)
    x_tail = x_head
    if TAIL > 0:
        x_tail = _load_tile(x_rows, is_kept, tail, tail_mask)
    mean, rstd = tile_statistics(x_head, x_tail, head_mask, tail_mask, eps, WIDTH, TAIL)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, mask=is_kept)
        tl.store(rstd_ptr + row, rstd, mask=is_kept)
    x_head = (x_head - mean[:, None]) * rstd[:, None]
    if TAIL > 0:
        x_tail = (x_tail - mean[:, None]) * rstd[:, None]
    if normalised_ptr is not None:
        normalised_rows = normalised_ptr + row[:, None] * WIDTH
        _store_tile(normalised_rows, x_head, is_kept, head, head_mask)
        if TAIL > 0:
            _store_tile(normalised_rows, x_tail, is_kept, tail, tail_mask)

    if grad_ptr is not None:
        grad_rows = grad_ptr + row[:, None] * grad_stride
        g_head, total, projection = _weighted_gradient(x_head, grad_rows, weight_ptr, is_kept, head, head_mask)
        if TAIL > 0:
            g_tail, total_tail, projection_tail = _weighted_gradient(
                x_tail, grad_rows, weight_ptr, is_kept, tail, tail_mask
            )
            total += total_tail
            projection += projection_tail
        total /= WIDTH
        projection /= WIDTH
        residual_grad_rows = residual_grad_ptr
        if residual_grad_ptr is not None:
            residual_grad_rows += full[:, None] * residual_grad_stride
        dx_rows = dx_ptr + full[:, None] * WIDTH
        if kept_ptr is None:
            is_kept = None
        _store_gradient(
            dx_rows, residual_grad_rows, x_head, g_head, total, projection, rstd, is_kept, row_mask, head, head_mask
        )  # fmt: skip
        if TAIL > 0:
            _store_gradient(
                dx_rows, residual_grad_rows, x_tail, g_tail, total, projection, rstd, is_kept, row_mask, tail, tail_mask
            )  # fmt: skip


@triton.jit
def _load_tile(x_rows, row_mask, columns, column_mask):
    return tl.load(x_rows + columns[None, :], mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_tile(rows, values, row_mask, columns, column_mask):
    tl.store(rows + columns[None, :], values.to(rows.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


@triton.jit
def _weighted_gradient(x, grad_rows, weight_ptr, row_mask, columns, column_mask):
    """g, 0 where masked, with the row sums Σ g and Σ g x̂."""
    g = _load_tile(grad_rows, row_mask, columns, column_mask)
    if weight_ptr is not None:
        g *= tl.load(weight_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    return g, tl.sum(g, axis=1), tl.sum(g * x, axis=1)


@triton.jit
def _store_gradient(
    dx_rows, residual_grad_rows, x, g, total, projection, rstd, is_kept, row_mask, columns, column_mask
):
    dx = (g - total[:, None] - x * projection[:, None]) * rstd[:, None]
    of_dropped = 0.0
    if residual_grad_rows is not None:
        of_dropped = _load_tile(residual_grad_rows, row_mask, columns, column_mask)
        dx += of_dropped
    if is_kept is not None:
        dx = tl.where(is_kept[:, None], dx, of_dropped)
    _store_tile(dx_rows, dx, row_mask, columns, column_mask)


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described(
        "column_sums_kernel",
        lambda a: (a["rows"], a["width"]),
        ("rstd_ptr", "kept_ptr"),
    ),
)
def column_sums_kernel(
    grad_ptr,  # [rows, width]
    x_ptr,  # [rows, width] or None
    mean_ptr,  # [rows], float32, with x
    rstd_ptr,  # [rows], float32, with x
    kept_ptr,  # [1 + B] or None
    sums_ptr,  # [splits, width], or with x [splits, 2, width]; float32
    rows,
    tokens,
    width,
    grad_stride,
    x_stride,
    SPLIT_ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """Of one block of columns over SPLIT_ROWS rows: Σ grad, and with `x_ptr` Σ grad x̂ after it.

    These are the parts of dβ and dγ of `x̂ γ + β`. With `kept_ptr`, rows are those of kept samples, packed.
    """
    column_tiles = tl.cdiv(width, COLUMN_BLOCK)
    split = tl.program_id(0) // column_tiles
    column = (tl.program_id(0) % column_tiles) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    if kept_ptr is not None:
        rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
    total, projection = sum_rows(
        grad_ptr, x_ptr, mean_ptr, rstd_ptr, split * SPLIT_ROWS, rows, SPLIT_ROWS, column, column_mask,
        grad_stride, x_stride, ROW_BLOCK, COLUMN_BLOCK,
    )  # fmt: skip
    if x_ptr is not None:
        sums_ptr += split.to(tl.int64) * 2 * width
        tl.store(sums_ptr + width + column, projection, mask=column_mask)
    else:
        sums_ptr += split.to(tl.int64) * width
    tl.store(sums_ptr + column, total, mask=column_mask)


@triton.jit(
    do_not_specialize=["splits"],
    **described("sum_splits_kernel", lambda a: (a["splits"], a["width"]), ("scale_ptr", "second_ptr")),
)
def sum_splits_kernel(
    sums_ptr,  # [splits, width], or with second [splits, 2, width]; float32
    scale_ptr,  # [width] or None
    first_ptr,  # [width]
    second_ptr,  # [width] or None
    splits,
    width,
    SPLIT_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """Σ over splits of `sums`: `first`, times `scale` where there is one, and with `second_ptr` what lies after it."""
    column = tl.program_id(0) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < width
    if second_ptr is not None:
        second = _sum(sums_ptr + width, splits, 2 * width, column, column_mask, SPLIT_BLOCK, COLUMN_BLOCK)
        tl.store(second_ptr + column, second.to(second_ptr.dtype.element_ty), mask=column_mask)
        first = _sum(sums_ptr, splits, 2 * width, column, column_mask, SPLIT_BLOCK, COLUMN_BLOCK)
    else:
        first = _sum(sums_ptr, splits, width, column, column_mask, SPLIT_BLOCK, COLUMN_BLOCK)
    if scale_ptr is not None:
        first *= tl.load(scale_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    tl.store(first_ptr + column, first.to(first_ptr.dtype.element_ty), mask=column_mask)


@triton.jit
def _sum(
    sums_ptr, splits, split_stride, column, column_mask, SPLIT_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr
):  # fmt: skip
    total = tl.zeros([SPLIT_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    for start in range(0, splits, SPLIT_BLOCK):
        split = start + tl.arange(0, SPLIT_BLOCK)
        total += _load_tile(sums_ptr + split.to(tl.int64)[:, None] * split_stride, split < splits, column, column_mask)
    return tl.sum(total, axis=0)


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of x, weight and bias that `needs` asks for, each like its input.

    grad, x: [..., D]; weight, bias: [D]. `residual_grad`, like x, of what went past the LayerNorm, is added to x's.
    """
    gradients = []
    if needs[0]:
        dx, mean, rstd = layer_norm_gradient_and_statistics(grad, x, weight, eps, residual_grad)
        gradients.append(dx)
    else:
        mean, rstd = row_statistics(x, eps)
    if any(needs[1:]):
        found = layer_norm_parameter_gradients(grad, x, mean, rstd)
        inputs = (weight, bias)
        gradients += [
            g.to(i.dtype) for g, i, need in zip(found, inputs, needs[1:], strict=True) if need and i is not None
        ]
    return gradients


def layer_norm_gradient_and_statistics(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, residual_grad: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, with `residual_grad` added, in x's dtype; and the rows' mean and 1/std, float32 [rows]."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = _empty_statistics(x)
    _launch(grad, x, weight, eps, residual_grad, dx, None, mean, rstd, None)
    return dx, mean, rstd


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The rows' mean and 1/std, float32 [rows]."""
    mean, rstd = _empty_statistics(x)
    _launch(None, x, None, eps, None, None, None, mean, rstd, None)
    return mean, rstd


def layer_norm_input_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual_grad: Tensor | None = None,
    kept: Tensor | None = None,
    normalised_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx, with `residual_grad` added, in x's dtype; and in `normalised_dtype`, where one is given, x̂.

    With `kept` (see `drop_path.keep_samples`) grad and x̂ are packed, the others full; a dropped sample's dx is its
    `residual_grad`, or 0.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normalised = None
    if normalised_dtype is not None:
        normalised = torch.empty(grad.shape, dtype=normalised_dtype, device=x.device)
    _launch(grad, x, weight, eps, residual_grad, dx, normalised, None, None, kept)
    return dx, normalised


def normalised_rows(
    x: Tensor, eps: float, dtype: torch.dtype, kept: Tensor | None = None, capacity: int | None = None
) -> Tensor:
    """x̂, the rows of x [..., D] without their mean, over their standard deviation, in `dtype`.

    With `kept` (see `drop_path.keep_samples`) only the kept samples', packed: of `capacity`, or else B, samples.
    """
    shape = x.shape if capacity is None else (capacity, *x.shape[1:])
    normalised = torch.empty(shape, dtype=dtype, device=x.device)
    _launch(None, x, None, eps, None, None, normalised, None, None, kept)
    return normalised


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.numel() // max(x.shape[-1], 1)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    return mean, rstd


def _launch(
    grad: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    residual_grad: Tensor | None,
    dx: Tensor | None,
    normalised: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    kept: Tensor | None,
) -> None:
    tokens = x.numel() // max(x.shape[0] * x.shape[-1], 1) if kept is not None else 1
    x = as_rows(x)
    rows, width = x.shape
    if dx is None and normalised is not None:
        # Nothing is written for the rows past the kept ones.
        rows = normalised.numel() // max(width, 1)
    if not rows or not width:
        return
    grad = None if grad is None else as_rows(grad)
    residual_grad = None if residual_grad is None else as_rows(residual_grad)
    itemsizes = tuple(each.element_size() for each in (grad, x, residual_grad, normalised) if each is not None)
    block, warps = settings.layer_norm_rows(width, itemsizes, hardware.architecture(x))
    head, tail = tiles.cover(width)
    run.run(
        layer_norm_backward_kernel,
        triton.cdiv(rows, block),
        x.device,
        grad,
        x,
        dense(weight),
        residual_grad,
        kept,
        dx,
        normalised,
        mean,
        rstd,
        rows,
        tokens,
        0 if grad is None else grad.stride(0),
        x.stride(0),
        0 if residual_grad is None else residual_grad.stride(0),
        eps,
        WIDTH=width,
        HEAD=head,
        TAIL=tail,
        ROWS=block,
        num_warps=warps,
    )


def layer_norm_parameter_gradients(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """dγ and dβ, both [D], in `dtype` or else x's."""
    x = as_rows(x)
    sums = _column_sums(grad, x, mean, rstd, None, dtype or x.dtype)
    return sums[1], sums[0]


def column_sums(grad: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
    """A bias's gradient where the weight wants none: `scale * Σ grad` over the rows, [D].

    With `kept` (see `drop_path.keep_samples`) over the kept samples' rows of a packed grad.
    """
    return _column_sums(grad, None, None, None, scale, dtype, kept)[0]


def _column_sums(
    grad: Tensor,
    x: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    kept: Tensor | None = None,
) -> list[Tensor]:
    """Σ grad over the rows, [D], and with x, Σ grad · x̂ too."""
    width = grad.shape[-1]
    if not grad.numel():
        return [torch.zeros(width, dtype=dtype, device=grad.device) for _ in range(1 if x is None else 2)]
    tokens = grad.numel() // (grad.shape[0] * width) if kept is not None else 1
    grad = as_rows(grad)
    rows = grad.shape[0]
    kinds = 1 if x is None else 2
    tile = settings.COLUMN_SUMS
    splits = triton.cdiv(rows, tile.depth)
    sums = torch.empty((splits, kinds, width), dtype=torch.float32, device=grad.device)
    run.run(
        column_sums_kernel,
        splits * triton.cdiv(width, tile.columns),
        grad.device,
        grad,
        x,
        mean,
        rstd,
        kept,
        sums,
        rows,
        tokens,
        width,
        grad.stride(0),
        0 if x is None else x.stride(0),
        SPLIT_ROWS=tile.depth,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    first = torch.empty(width, dtype=dtype, device=grad.device)
    second = None if x is None else torch.empty(width, dtype=dtype, device=grad.device)
    run.run(
        sum_splits_kernel,
        triton.cdiv(width, tile.columns),
        grad.device,
        sums,
        dense(scale),
        first,
        second,
        splits,
        width,
        SPLIT_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return [first] if second is None else [first, second]
