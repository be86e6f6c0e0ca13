"""The GEMM family: one kernel, what is fused before and after the product chosen at compile time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch, vendor_gemm
from deit_fast.kernels.device import (
    add_residual,
    copy_dropped,
    full_row,
    gelu,
    normalise,
    row_statistics,
    tile_of_program,
)
from deit_fast.kernels.layout import all_or_none, as_rows, dense, one_stride
from deit_fast.kernels.metadata import described_product, linear_shape

_GROUP = 8


_FUSED = (
    "PROLOGUE", "k_weight_ptr", "bias_ptr", "ACTIVATION", "layer_scale_ptr", "drop_path_scale_ptr", "residual_ptr",
    "kept_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"], **described_product("linear_kernel", linear_shape, _FUSED))
def linear_kernel(
    x_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    bias_ptr,
    k_bias_ptr,
    v_bias_ptr,
    residual_ptr,
    layer_scale_ptr,
    drop_path_scale_ptr,
    kept_ptr,
    y_ptr,
    k_ptr,
    v_ptr,
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
    """`y = epilogue(prologue(x) @ weight.T + bias)`; with `k_weight_ptr`, three such products of one `x`.

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
        mean, rstd = row_statistics(x_rows, row_mask, eps, in_features, ROW_BLOCK, DEPTH_BLOCK)

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


def _launch(
    x: Tensor,
    outputs: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
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
    arch, itemsize = launch.architecture(x), weights[0].element_size()
    tile = launch.gemm(columns, depth, itemsize, arch, prologue)
    if tile is None:
        if kept is not None:
            raise ValueError("the vendor's GEMM does not know which samples are kept")
        if residual is None:
            vendor_gemm.gemm(x, outputs, weights, biases, norm, eps, prologue, activation)
        else:
            scales = layer_scale, drop_path_scale
            vendor_gemm.gemm_residual(x, *outputs, *weights, *biases, prologue, residual, *scales, tokens)
        return
    launch.run(
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
        GROUP=_GROUP,
        PRECISION=launch.dot_precision(weights[0].dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _output(x: Tensor, weight: Tensor, capacity: int | None = None) -> Tensor:
    shape = x.shape[:-1] if capacity is None else (capacity, *x.shape[1:-1])
    return torch.empty((*shape, weight.shape[0]), dtype=weight.dtype, device=x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, input_activation: str) -> Tensor:
    y = _output(x, weight)
    _launch(x, (y,), (weight,), (bias,), prologue=input_activation, activation=activation)
    return y


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """With `kept` (see `drop_path.keep_samples`) only of x's kept samples, packed: [capacity or else B, ..., N]."""
    y = _output(x, weight, capacity)
    _launch(x, (y,), (weight,), (bias,), norm=(norm_weight, norm_bias), eps=eps, prologue="layer_norm", kept=kept)
    return y


def layer_norm_qkv(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    k_bias: Tensor | None,
    v_weight: Tensor,
    v_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = tuple(_output(x, weight) for weight in (q_weight, k_weight, v_weight))
    _launch(
        x,
        outputs,
        (q_weight, k_weight, v_weight),
        all_or_none((q_bias, k_bias, v_bias), q_weight),
        norm=(norm_weight, norm_bias),
        eps=eps,
        prologue="layer_norm",
    )
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
    """With `kept` (see `drop_path.keep_samples`) x holds the kept samples, packed; the others keep their residual."""
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
