"""The GEMM family: one kernel, what is fused before and after the product chosen at compile time."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import (
    add_residual,
    copy_dropped,
    full_row,
    gelu,
    normalise,
    tile_of_program,
)
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import all_or_none, as_rows, dense, one_stride
from deit_fast.kernels.launching.metadata import described_product, linear_shape
from deit_fast.kernels.linear import settings, vendor_gemm

_FUSED = (
    "PROLOGUE", "k_weight_ptr", "bias_ptr", "ACTIVATION", "layer_scale_ptr", "drop_path_scale_ptr", "residual_ptr",
    "kept_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"], **described_product("linear_kernel", linear_shape, _FUSED))
def linear_kernel(
    x_ptr,  # [rows, in_features]
    norm_weight_ptr,  # [in_features] or None
    norm_bias_ptr,  # [in_features] or None
    weight_ptr,  # [out_features, in_features]; of q where there are three
    k_weight_ptr,  # [out_features, in_features] or None
    v_weight_ptr,  # [out_features, in_features] or None
    bias_ptr,  # [out_features] or None
    k_bias_ptr,  # [out_features] or None
    v_bias_ptr,  # [out_features] or None
    residual_ptr,  # [rows, out_features] or None
    layer_scale_ptr,  # [out_features] or None
    drop_path_scale_ptr,  # [B] or None
    kept_ptr,  # [1 + B] or None
    y_ptr,  # [rows, out_features]
    k_ptr,  # [rows, out_features] or None
    v_ptr,  # [rows, out_features] or None
    rows,
    tokens,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    residual_stride,
    eps,
    EVEN_DEPTH: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = residual + drop_path_scale * layer_scale * activation(prologue(x) @ weight.T + bias)`, less what is absent.

    With `k_weight_ptr`, three such products of one x. The residual branch of a block, with LayerScale (Touvron et al.
    2021, 'Going deeper', equation 6) and drop path (Huang et al. 2016); a tiled product as in Triton's tutorial.

    With `kept_ptr`, rows are the kept samples': x is full and y packed, or with a residual x packed and y full.
    """
    column_tiles = tl.cdiv(out_features, COLUMN_BLOCK)
    if k_weight_ptr is not None:
        tile_m, tile_n = tile_of_program(tl.cdiv(rows, ROW_BLOCK), 3 * column_tiles, GROUP)
        projection = tile_n // column_tiles
        tile_n = tile_n % column_tiles
        if projection == 1:
            weight_ptr = k_weight_ptr
            y_ptr = k_ptr
            if bias_ptr is not None:
                bias_ptr = k_bias_ptr
        elif projection == 2:
            weight_ptr = v_weight_ptr
            y_ptr = v_ptr
            if bias_ptr is not None:
                bias_ptr = v_bias_ptr
    else:
        tile_m, tile_n = tile_of_program(tl.cdiv(rows, ROW_BLOCK), column_tiles, GROUP)

    row = tile_m.to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = tile_n * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < out_features
    depth = tl.arange(0, DEPTH_BLOCK)
    x_row = row
    if kept_ptr is not None:
        kept_rows = tl.load(kept_ptr) * tokens
        first = tile_m * ROW_BLOCK
        if residual_ptr is not None:
            dropped, last = tl.maximum(first, kept_rows), tl.minimum(first + ROW_BLOCK, rows)
            copy_dropped(
                residual_ptr, y_ptr, kept_ptr, dropped, last, tokens, column, column_mask, residual_stride, out_features
            )  # fmt: skip
        if first >= kept_rows:
            return
        row_mask = row < kept_rows
        if residual_ptr is None:
            x_row = full_row(kept_ptr, row, row_mask, tokens).to(tl.int64)
    x_rows = x_ptr + x_row[:, None] * x_stride
    weight_columns = weight_ptr + column.to(tl.int64)[None, :] * weight_stride

    if PROLOGUE == "layer_norm":
        mean, rstd = _running_statistics(x_rows, row_mask, eps, in_features, ROW_BLOCK, DEPTH_BLOCK)

    product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    for start in range(0, in_features, DEPTH_BLOCK):
        k = start + depth
        if EVEN_DEPTH:
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=column_mask[None, :], other=0.0)
        else:
            k_mask = k < in_features
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_columns + k[:, None], mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        if PROLOGUE == "layer_norm":
            x = normalise(x.to(tl.float32), mean, rstd, norm_weight_ptr, norm_bias_ptr, k, k < in_features)
            if not EVEN_DEPTH:
                x = tl.where((k < in_features)[None, :], x, 0.0)
        elif PROLOGUE != "none":
            x = gelu(x.to(tl.float32), PROLOGUE)
        product = tl.dot(x.to(weight.dtype), weight, product, input_precision=PRECISION)

    if bias_ptr is not None:
        product += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "none":
        product = gelu(product, ACTIVATION)
    if residual_ptr is not None:
        y_row = row
        if kept_ptr is not None:
            y_row = full_row(kept_ptr, row, row_mask, tokens)
            row = y_row.to(tl.int64)
        residual_ptrs = residual_ptr + row[:, None] * residual_stride + column[None, :]
        product = add_residual(
            product,
            residual_ptrs,
            layer_scale_ptr,
            drop_path_scale_ptr,
            y_row,
            column,
            row_mask,
            column_mask,
            tokens,
        )
    tl.store(
        y_ptr + row[:, None] * out_features + column[None, :],
        product.to(y_ptr.dtype.element_ty),
        mask=row_mask[:, None] & column_mask[None, :],
    )


@triton.jit
def _running_statistics(x_rows, row_mask, eps, width, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and 1/std of the rows at pointers `x_rows` [ROWS, 1], in one pass of CHUNK columns a step.

    Chunks are merged by Chan's update, so that a large mean costs no digits (Chan, Golub & LeVeque 1983).
    Sums are of differences from the row's first element, so that a constant row has exactly its mean.
    """
    first = tl.load(x_rows, mask=row_mask[:, None], other=0.0).to(tl.float32)
    mean = tl.zeros([ROWS], dtype=tl.float32)
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        column_mask = (columns < width)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=row_mask[:, None] & column_mask, other=0.0).to(tl.float32)
        x = tl.where(column_mask, x - first, 0.0)
        count = tl.minimum(width - start, CHUNK) * 1.0
        seen = start * 1.0
        chunk_mean = tl.sum(x, axis=1) / count
        deviation = tl.where(column_mask, x - chunk_mean[:, None], 0.0)
        shift = chunk_mean - mean
        squares += tl.sum(deviation * deviation, axis=1) + shift * shift * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
    return tl.sum(first, axis=1) + mean, 1.0 / tl.sqrt(squares / width + eps)


def _launch(
    x: Tensor,
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: tuple[Tensor | None, Tensor | None] = (None, None),
    eps: float = 0.0,
    prologue: str = "none",
    activation: str = "none",
    residual: Tensor | None = None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    if outputs[0].numel() == 0:
        return
    tokens = 1
    if drop_path_scale is not None or kept is not None:
        full = x if residual is None else residual
        tokens = full.numel() // (full.shape[0] * full.shape[-1])
    x = as_rows(x)
    depth = x.shape[1]
    weights = one_stride(weights)
    columns = weights[0].shape[0]
    rows = outputs[0].numel() // columns
    absent = (None,) * (3 - len(weights))
    residual = None if residual is None else as_rows(residual)
    arch, itemsize = hardware.architecture(x), weights[0].element_size()
    tile = settings.gemm(columns, depth, itemsize, arch, prologue)
    if tile is None:
        if kept is not None:
            raise ValueError("the vendor's GEMM does not know which samples are kept")
        if residual is None:
            vendor_gemm.gemm(x, outputs, weights, biases, norm, eps, prologue, activation)
        else:
            (y,), (weight,), (bias,) = outputs, weights, biases
            vendor_gemm.gemm_residual(x, y, weight, bias, prologue, residual, layer_scale, drop_path_scale, tokens)
        return
    run.run(
        linear_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) * len(weights),
        x.device,
        x,
        *map(dense, norm),
        *weights,
        *absent,
        *map(dense, biases),
        *absent,
        residual,
        dense(layer_scale),
        dense(drop_path_scale),
        kept,
        *outputs,
        *absent,
        rows,
        tokens,
        depth,
        columns,
        x.stride(0),
        weights[0].stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        EVEN_DEPTH=depth % tile.depth == 0,
        PROLOGUE=prologue,
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(weights[0].dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _output(x: Tensor, weight: Tensor, capacity: int | None = None) -> Tensor:
    shape = x.shape[:-1] if capacity is None else (capacity, *x.shape[1:-1])
    return torch.empty((*shape, weight.shape[0]), dtype=weight.dtype, device=x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, input_activation: str) -> Tensor:
    """x [..., K] through weight [N, K] and bias [N]: [..., N], in weight's dtype."""
    y = _output(x, weight)
    _launch(x, (y,), (weight,), (bias,), prologue=input_activation, activation=activation)
    return y


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> list[Tensor]:
    """An output [..., N] for each of `weights` [N, K], one or three of one shape.

    With `kept` (see `drop_path.keep_samples`) only of x's kept samples, packed: [capacity or else B, ..., N].
    """
    outputs = [_output(x, weight, capacity) for weight in weights]
    biases = all_or_none(biases, weights[0])
    norm = norm_weight, norm_bias
    _launch(x, outputs, weights, biases, norm=norm, eps=eps, prologue="layer_norm", kept=kept)
    return outputs


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    input_activation: str,
    kept: Tensor | None = None,
) -> Tensor:
    """x [B, ..., K] to [B, ..., N], like residual, in the dtype that residual, weight and layer_scale promote to.

    weight: [N, K]; bias, layer_scale: [N]; drop_path_scale: [B], float32. With `kept` (see `drop_path.keep_samples`)
    x holds the kept samples, packed; the others keep their residual.
    """
    dtype = torch.promote_types(residual.dtype, weight.dtype)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    y = torch.empty(residual.shape, dtype=dtype, device=residual.device)
    _launch(
        x,
        (y,),
        (weight,),
        (bias,),
        prologue=input_activation,
        residual=residual,
        layer_scale=layer_scale,
        drop_path_scale=drop_path_scale,
        kept=kept,
    )
    return y
