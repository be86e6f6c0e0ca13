"""The GEMM family: one plain product, and what follows it chosen at compile time.

Nothing is applied to an operand as it loads: that would be repeated for every tile of the other dimension, with the
tensor cores waiting. LayerNorm is a pass of its own, GELU is in the epilogue of what it is applied to.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import copy_dropped, full_row, tile_of_program
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import all_or_none, as_rows, dense, one_stride
from deit_fast.kernels.launching.metadata import described_product, linear_shape
from deit_fast.kernels.layer_norm.forward import layer_norm
from deit_fast.kernels.linear import persistent, settings, vendor_gemm
from deit_fast.kernels.linear.epilogue import epilogue, epilogue_by_quarters

_FUSED = (
    "k_weight_ptr", "bias_ptr", "ACTIVATION", "activated_ptr", "layer_scale_ptr", "drop_path_scale_ptr",
    "residual_ptr", "kept_ptr",
)  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"], **described_product("linear_kernel", linear_shape, _FUSED))
def linear_kernel(
    x_ptr,  # [rows, in_features]
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
    activated_ptr,  # [rows, out_features] or None
    rows,
    tokens,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    residual_stride,
    EVEN_DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    QUARTERS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`y = residual + drop_path_scale * layer_scale * activation(x @ weight.T + bias)`, less what is absent.

    With `k_weight_ptr`, three such products of one x; with `activated_ptr`, y is what goes into the activation, and
    `activated` what comes out. The residual branch of a block, with LayerScale (Touvron et al. 2021, 'Going deeper',
    equation 6) and drop path (Huang et al. 2016); a tiled product as in Triton's tutorial.

    With `kept_ptr`, x holds the rows of kept samples, packed, and so does y, unless there is a residual: then y is
    full. QUARTERS: as `epilogue_by_quarters`.
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

    first = tile_m * ROW_BLOCK
    row = first + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = tile_n * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < out_features
    if kept_ptr is not None:
        kept_rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if residual_ptr is not None:
            dropped, last = tl.maximum(first, kept_rows), tl.minimum(first + ROW_BLOCK, rows)
            copy_dropped(
                residual_ptr, y_ptr, kept_ptr, dropped, last, tokens, column, column_mask, residual_stride, out_features
            )  # fmt: skip
        if first >= kept_rows:
            return
        row_mask = row < kept_rows

    depth = tl.arange(0, DEPTH_BLOCK)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * x_stride + depth[None, :]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * weight_stride + depth[:, None]
    product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    for start in range(0, in_features, DEPTH_BLOCK):
        if EVEN_DEPTH:
            x = tl.load(x_ptrs + start, mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=column_mask[None, :], other=0.0)
        else:
            k_mask = start + depth < in_features
            x = tl.load(x_ptrs + start, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            weight = tl.load(weight_ptrs + start, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        product = tl.dot(x.to(weight.dtype), weight, product, input_precision=PRECISION)

    if kept_ptr is not None and residual_ptr is not None:
        row = full_row(kept_ptr, row, row_mask, tokens)
    if QUARTERS:
        epilogue_by_quarters(
            product, row, tile_n * COLUMN_BLOCK, row_mask, bias_ptr, residual_ptr, layer_scale_ptr,
            drop_path_scale_ptr, y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION,
        )  # fmt: skip
    else:
        epilogue(
            product, row, column, row_mask, column_mask, bias_ptr, residual_ptr, layer_scale_ptr,
            drop_path_scale_ptr, y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION,
        )  # fmt: skip


def _launch(
    x: Tensor,
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    activation: str = "none",
    activated: Tensor | None = None,
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
    fused = settings.fused(activation, activated is not None, residual is not None)
    asked = settings.rows_asked(rows), columns, depth, itemsize, arch
    if settings.vendor("linear", fused, *asked, len(weights), kept is not None):
        for y, weight, bias in zip(outputs, weights, biases, strict=True):
            vendor_gemm.linear(
                x, y, weight, bias, activation, activated, residual, layer_scale, drop_path_scale, tokens, kept
            )  # fmt: skip
        return
    if persistent.takes(x, weights, kept, arch) and settings.persistent(*asked, fused):
        tile = settings.persistent_gemm(*asked, fused)
        persistent.linear(
            x, outputs[0], weights[0], biases[0], activation, activated, residual, layer_scale, drop_path_scale,
            tokens, tile,
        )  # fmt: skip
        return
    tile = settings.gemm(*asked, fused)
    run.run(
        linear_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns) * len(weights),
        x.device,
        x,
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
        activated,
        rows,
        tokens,
        depth,
        columns,
        x.stride(0),
        weights[0].stride(0),
        0 if residual is None else residual.stride(0),
        EVEN_DEPTH=depth % tile.depth == 0,
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        QUARTERS=settings.quarters(tile, fused, arch),
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(weights[0].dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _output(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=weight.dtype, device=x.device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x [..., K] through weight [N, K] and bias [N]: [..., N], in weight's dtype."""
    y = _output(x, weight)
    _launch(x, (y,), (weight,), (bias,), activation=activation)
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
    activation: str = "none",
) -> list[Tensor]:
    """An output [..., N] for each of `weights` [N, K], one or three of one shape.

    With `kept` (see `drop_path.keep_samples`) only of x's kept samples, packed: [capacity or else B, ..., N].
    """
    x = layer_norm(x, norm_weight, norm_bias, eps, weights[0].dtype, kept, capacity)
    outputs = [_output(x, weight) for weight in weights]
    _launch(x, outputs, weights, all_or_none(biases, weights[0]), activation=activation, kept=kept)
    return outputs


def layer_norm_fc1(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What goes into the activation and what comes out, each like an output of `layer_norm_linear`."""
    x = layer_norm(x, norm_weight, norm_bias, eps, weight.dtype, kept, capacity)
    pre_activation, activated = _output(x, weight), _output(x, weight)
    _launch(x, (pre_activation,), (weight,), (bias,), activation=activation, activated=activated, kept=kept)
    return pre_activation, activated


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
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
        residual=residual,
        layer_scale=layer_scale,
        drop_path_scale=drop_path_scale,
        kept=kept,
    )
    return y
