"""LayerNorm and a linear layer for narrow rows: a tile of whole rows stays on chip while all columns are computed.

x is read once and normalised once, where a tile of the output for each program (kernels/linear.py) has every program
along the columns do it again: at a width of 192 that is 6 to 12 times.
"""

import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels.device import full_row, normalised_rows
from deit_fast.kernels.layout import dense
from deit_fast.kernels.metadata import described_product, linear_shape


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described_product(
        "linear_rows_kernel",
        lambda a: linear_shape(a | {"in_features": a["WIDTH"]}),
        ("norm_weight_ptr", "k_weight_ptr", "bias_ptr", "kept_ptr"),
    ),
)
def linear_rows_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    bias_ptr,
    k_bias_ptr,
    v_bias_ptr,
    kept_ptr,
    y_ptr,
    k_ptr,
    v_ptr,
    rows,
    tokens,
    out_features,
    x_stride,
    weight_stride,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """`y = LayerNorm(x) @ weight.T + bias`; with `k_weight_ptr`, three such products of one `x`.

    With `kept_ptr`, rows are the kept samples': x is full and y packed.
    """
    row = tl.program_id(0).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    x_row = row
    if kept_ptr is not None:
        kept_rows = tl.load(kept_ptr) * tokens
        if tl.program_id(0) * ROW_BLOCK >= kept_rows:
            return
        row_mask = row < kept_rows
        x_row = full_row(kept_ptr, row, row_mask, tokens).to(tl.int64)
    x_rows = x_ptr + x_row[:, None] * x_stride
    head = tl.arange(0, HEAD)
    head_mask = head < WIDTH
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    tail_mask = tail < WIDTH
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    x_head, x_tail = normalised_rows(
        x_rows, row_mask, norm_weight_ptr, norm_bias_ptr, head, head_mask, tail, tail_mask, eps, dtype, WIDTH, TAIL
    )
    _all_columns(
        x_head, x_tail, weight_ptr, bias_ptr, y_ptr, row, row_mask, head, head_mask, tail, tail_mask, out_features,
        weight_stride, TAIL, COLUMN_BLOCK,
    )  # fmt: skip
    if k_weight_ptr is not None:
        _all_columns(
            x_head, x_tail, k_weight_ptr, k_bias_ptr, k_ptr, row, row_mask, head, head_mask, tail, tail_mask,
            out_features, weight_stride, TAIL, COLUMN_BLOCK,
        )  # fmt: skip
        _all_columns(
            x_head, x_tail, v_weight_ptr, v_bias_ptr, v_ptr, row, row_mask, head, head_mask, tail, tail_mask,
            out_features, weight_stride, TAIL, COLUMN_BLOCK,
        )  # fmt: skip


@triton.jit
def _all_columns(
    x_head, x_tail, weight_ptr, bias_ptr, y_ptr, row, row_mask, head, head_mask, tail, tail_mask, out_features,
    weight_stride, TAIL: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, out_features, COLUMN_BLOCK):
        column = start + tl.arange(0, COLUMN_BLOCK)
        column_mask = column < out_features
        weight_columns = weight_ptr + column.to(tl.int64)[None, :] * weight_stride
        weight = tl.load(weight_columns + head[:, None], mask=head_mask[:, None] & column_mask[None, :], other=0.0)
        product = tl.dot(x_head, weight)
        if TAIL > 0:
            weight = tl.load(weight_columns + tail[:, None], mask=tail_mask[:, None] & column_mask[None, :], other=0.0)
            product = tl.dot(x_tail, weight, product)
        if bias_ptr is not None:
            product += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
        y_rows = y_ptr + row[:, None] * out_features
        product = product.to(y_ptr.dtype.element_ty)
        tl.store(y_rows + column[None, :], product, mask=row_mask[:, None] & column_mask[None, :])


def layer_norm_linear_rows(
    x: Tensor,
    outputs: tuple[Tensor, ...],
    norm: tuple[Tensor | None, Tensor | None],
    eps: float,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    kept: Tensor | None,
    tokens: int,
    tile: launch.Tile,
) -> None:
    """Fills one or three `outputs`; x [rows, K], weights of one stride. `tokens` rows make a sample."""
    columns, width = weights[0].shape
    rows = outputs[0].numel() // columns
    absent = (None,) * (3 - len(weights))
    head, tail = launch.cover(width)
    launch.run(
        linear_rows_kernel,
        triton.cdiv(rows, tile.rows),
        x.device,
        x,
        *map(dense, norm),
        *weights,
        *absent,
        *map(dense, biases),
        *absent,
        kept,
        *outputs,
        *absent,
        rows,
        tokens,
        columns,
        x.stride(0),
        weights[0].stride(0),
        eps,
        WIDTH=width,
        HEAD=head,
        TAIL=tail,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
