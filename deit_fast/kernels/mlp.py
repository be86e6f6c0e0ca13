"""The whole MLP half of a block in one kernel, where a row of its width stays on chip."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import add_residual, gelu, normalise, tile_statistics
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import as_rows, dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.launching.settings import Tile, setting
from deit_fast.kernels.linear.forward import layer_norm_linear, linear_residual

# Where a GPU's memory is slow beside its tensor cores, what the hidden layer's bytes cost is more than what its tiles
# cost again for every program.
_ARCHITECTURES = frozenset({"sm_86", "sm_89", "sm_120"})
WIDEST = 192


@setting("mlp")
def mlp_tile(width: int, arch: str) -> Tile:
    """The whole MLP in one kernel: `rows` stay on chip, `columns` of the hidden layer a step."""
    return Tile(32, 64, width, 4, 2)


_FUSED = (
    "norm_weight_ptr", "fc1_bias_ptr", "ACTIVATION", "fc2_bias_ptr", "layer_scale_ptr", "drop_path_scale_ptr",
)  # fmt: skip


@triton.jit(
    **described(
        "mlp_kernel",
        lambda a: (a["rows"], a["WIDTH"], a["HIDDEN"]),
        _FUSED,
        flops=lambda a: 4 * a["rows"] * a["WIDTH"] * a["HIDDEN"],
    )
)
def mlp_kernel(
    x_ptr,  # [rows, WIDTH]
    norm_weight_ptr,  # [WIDTH] or None
    norm_bias_ptr,  # [WIDTH] or None
    fc1_weight_ptr,  # [HIDDEN, WIDTH]
    fc1_bias_ptr,  # [HIDDEN] or None
    fc2_weight_ptr,  # [WIDTH, HIDDEN]
    fc2_bias_ptr,  # [WIDTH] or None
    layer_scale_ptr,  # [WIDTH] or None
    drop_path_scale_ptr,  # [B] or None
    y_ptr,  # [rows, WIDTH]
    rows,
    tokens,
    x_stride,
    fc1_stride,
    fc2_stride,
    eps,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    HIDDEN_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = x + drop_path_scale * layer_scale * (gelu(LayerNorm(x) @ fc1.T + b1) @ fc2.T + b2)`.

    Dosovitskiy et al. 2021, equation 3. HEAD + TAIL are the width in two tiles. The hidden layer lives only as
    ROW_BLOCK × HIDDEN_BLOCK tiles.
    """
    row = tl.program_id(0) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    head = tl.arange(0, HEAD)
    head_mask = head < WIDTH
    tail = HEAD + tl.arange(0, TAIL if TAIL > 0 else 16)
    tail_mask = tail < WIDTH
    x_rows = x_ptr + row.to(tl.int64)[:, None] * x_stride
    dtype: tl.constexpr = fc1_weight_ptr.dtype.element_ty
    x_head, x_tail = _normalised_rows(
        x_rows, row_mask, norm_weight_ptr, norm_bias_ptr, head, head_mask, tail, tail_mask, eps, dtype, WIDTH, TAIL
    )
    branch_head = tl.zeros([ROW_BLOCK, HEAD], dtype=tl.float32)
    if TAIL > 0:
        branch_tail = tl.zeros([ROW_BLOCK, TAIL], dtype=tl.float32)

    for start in range(0, HIDDEN, HIDDEN_BLOCK):
        unit = start + tl.arange(0, HIDDEN_BLOCK)
        unit_mask = unit < HIDDEN
        fc1_columns = fc1_weight_ptr + unit[None, :] * fc1_stride
        weight = tl.load(fc1_columns + head[:, None], mask=head_mask[:, None] & unit_mask[None, :], other=0.0)
        hidden = tl.dot(x_head, weight, input_precision=PRECISION)
        if TAIL > 0:
            weight = tl.load(fc1_columns + tail[:, None], mask=tail_mask[:, None] & unit_mask[None, :], other=0.0)
            hidden = tl.dot(x_tail, weight, hidden, input_precision=PRECISION)
        if fc1_bias_ptr is not None:
            hidden += tl.load(fc1_bias_ptr + unit, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
        hidden = gelu(hidden, ACTIVATION, True).to(dtype)
        fc2_rows = fc2_weight_ptr + unit[:, None]
        weight = tl.load(fc2_rows + head[None, :] * fc2_stride, mask=unit_mask[:, None] & head_mask[None, :], other=0.0)
        branch_head = tl.dot(hidden, weight, branch_head, input_precision=PRECISION)
        if TAIL > 0:
            weight = tl.load(
                fc2_rows + tail[None, :] * fc2_stride, mask=unit_mask[:, None] & tail_mask[None, :], other=0.0
            )
            branch_tail = tl.dot(hidden, weight, branch_tail, input_precision=PRECISION)

    _store_branch(
        branch_head, x_rows, fc2_bias_ptr, layer_scale_ptr, drop_path_scale_ptr, y_ptr,
        row, head, row_mask, head_mask, tokens, WIDTH,
    )  # fmt: skip
    if TAIL > 0:
        _store_branch(
            branch_tail, x_rows, fc2_bias_ptr, layer_scale_ptr, drop_path_scale_ptr, y_ptr,
            row, tail, row_mask, tail_mask, tokens, WIDTH,
        )  # fmt: skip


@triton.jit
def _normalised_rows(
    x_rows, row_mask, norm_weight_ptr, norm_bias_ptr, head, head_mask, tail, tail_mask, eps, DTYPE: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Whole rows after LayerNorm as two tiles of DTYPE, 0 where masked; the second is the first where TAIL is 0."""
    x_head = tl.load(x_rows + head[None, :], mask=row_mask[:, None] & head_mask[None, :], other=0.0).to(tl.float32)
    x_tail = x_head
    if TAIL > 0:
        x_tail = tl.load(x_rows + tail[None, :], mask=row_mask[:, None] & tail_mask[None, :], other=0.0).to(tl.float32)
    mean, rstd = tile_statistics(x_head, x_tail, head_mask, tail_mask, eps, WIDTH, TAIL)
    x_head = normalise(x_head, mean, rstd, norm_weight_ptr, norm_bias_ptr, head, head_mask)
    # Before the cast: what padding is normalised to may be past float16's largest.
    x_head = tl.where(head_mask[None, :], x_head, 0.0).to(DTYPE)
    if TAIL > 0:
        x_tail = normalise(x_tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, tail, tail_mask)
        x_tail = tl.where(tail_mask[None, :], x_tail, 0.0).to(DTYPE)
    else:
        x_tail = x_head
    return x_head, x_tail


@triton.jit
def _store_branch(
    branch, x_rows, bias_ptr, layer_scale_ptr, drop_path_scale_ptr, y_ptr,
    row, column, row_mask, column_mask, tokens, WIDTH: tl.constexpr,
):  # fmt: skip
    if bias_ptr is not None:
        branch += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    # x is read again as the residual, from cache: keeping it would hold registers through the loop.
    y = add_residual(
        branch,
        x_rows + column[None, :],
        layer_scale_ptr,
        drop_path_scale_ptr,
        row,
        column,
        row_mask,
        column_mask,
        tokens,
    )
    tl.store(
        y_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


def fits(width: int, arch: str) -> bool:
    """Whether the whole MLP of a block so wide is best one kernel there."""
    return width <= WIDEST and arch in _ARCHITECTURES


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    activation: str,
    kept: Tensor | None = None,
) -> Tensor:
    """x + drop_path_scale * layer_scale * (activation(LN(x) @ fc1_weight.T + fc1_bias) @ fc2_weight.T + fc2_bias).

    x: [B, ..., D]; fc1_weight: [H, D]; fc2_weight: [D, H]; drop_path_scale: [B]. The result is in the dtype that x,
    fc2_weight and layer_scale promote to. With `kept` (see `drop_path.keep_samples`) the other samples come out as
    they are; x and y are full.
    """
    units, width = fc1_weight.shape
    arch = hardware.architecture(x)
    if not fits(width, arch) or fc1_weight.dtype is torch.float32 or activation == "none" or kept is not None:
        # Neither float32 tiles of a whole row nor the kept samples' index fit beside its weights.
        norm = norm_weight, norm_bias, eps
        (hidden,) = layer_norm_linear(x, *norm, [fc1_weight], [fc1_bias], kept, activation=activation)
        return linear_residual(hidden, fc2_weight, fc2_bias, x, layer_scale, drop_path_scale, kept)
    dtype = torch.promote_types(x.dtype, fc2_weight.dtype)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    if y.numel() == 0:
        return y
    tokens = x.numel() // (x.shape[0] * width)
    x = as_rows(x)
    fc1_weight, fc2_weight = as_rows(fc1_weight), as_rows(fc2_weight)
    tile = mlp_tile(width, arch)
    head, tail = tiles.cover(width)
    run.run(
        mlp_kernel,
        triton.cdiv(x.shape[0], tile.rows),
        x.device,
        x,
        dense(norm_weight),
        dense(norm_bias),
        fc1_weight,
        dense(fc1_bias),
        fc2_weight,
        dense(fc2_bias),
        dense(layer_scale),
        dense(drop_path_scale),
        y,
        x.shape[0],
        tokens,
        x.stride(0),
        fc1_weight.stride(0),
        fc2_weight.stride(0),
        eps,
        WIDTH=width,
        HEAD=head,
        TAIL=tail,
        HIDDEN=units,
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        HIDDEN_BLOCK=tile.columns,
        PRECISION=hardware.dot_precision(fc1_weight.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return y
