"""The input's gradient of the GEMM family: one GEMM with everything else in its prologue and epilogue."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import full_row, tile_of_program
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import as_rows, dense, one_stride
from deit_fast.kernels.launching.metadata import described_product, linear_shape
from deit_fast.kernels.linear import settings


def _input_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    rows, out_features, in_features = linear_shape(arguments)
    return rows, in_features, out_features


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described_product(
        "input_gradient_kernel",
        _input_gradient_shape,
        ("k_weight_ptr", "layer_scale_ptr", "ACTIVATION", "drop_path_scale_ptr", "kept_ptr"),
    ),
)
def input_gradient_kernel(
    grad_ptr,  # [rows, out_features]; of q where there are three
    k_grad_ptr,  # [rows, out_features] or None
    v_grad_ptr,  # [rows, out_features] or None
    weight_ptr,  # [out_features, in_features]
    k_weight_ptr,  # [out_features, in_features] or None
    v_weight_ptr,  # [out_features, in_features] or None
    layer_scale_ptr,  # [out_features] or None
    drop_path_scale_ptr,  # [B] or None
    kept_ptr,  # [1 + B] or None
    x_ptr,  # [rows, in_features] with an activation, else None
    dx_ptr,  # [rows, in_features]
    rows,
    tokens,
    in_features,
    out_features,
    grad_stride,
    weight_stride,
    x_stride,
    EVEN_DEPTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PACKED_GRAD: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dx = drop_path_scale * ((layer_scale * grad) @ weight) * activation'(x)`, or the sum of three such products.

    The derivative of `linear_kernel` by what goes into its activation, or by LayerNorm's output.

    With `kept_ptr`, rows are those of kept samples: x and dx are packed, and grad if PACKED_GRAD says so.
    """
    tile_m, tile_n = tile_of_program(tl.cdiv(rows, ROW_BLOCK), tl.cdiv(in_features, COLUMN_BLOCK), GROUP)
    row = tile_m * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    row_offset = row.to(tl.int64)[:, None]
    column = tile_n * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < in_features
    grad_row = row
    if kept_ptr is not None:
        kept_rows = tl.load(kept_ptr) * tokens
        if tile_m * ROW_BLOCK >= kept_rows:
            return
        row_mask = row < kept_rows
        if not PACKED_GRAD:
            grad_row = full_row(kept_ptr, row, row_mask, tokens)
    grad_offset = grad_row.to(tl.int64)[:, None] * grad_stride

    product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    projections: tl.constexpr = 1 if k_grad_ptr is None else 3
    grads = (grad_ptr, k_grad_ptr, v_grad_ptr)
    weights = (weight_ptr, k_weight_ptr, v_weight_ptr)
    for i in tl.static_range(projections):
        product = _add_product(
            product, grads[i] + grad_offset, weights[i] + column[None, :], layer_scale_ptr, row_mask, column_mask,
            weight_stride, out_features, EVEN_DEPTH, DEPTH_BLOCK, PRECISION,
        )  # fmt: skip

    mask = row_mask[:, None] & column_mask[None, :]
    if drop_path_scale_ptr is not None:
        scale = tl.load(drop_path_scale_ptr + grad_row // tokens, mask=row_mask, other=0.0)
        product *= scale.to(tl.float32)[:, None]
    if ACTIVATION != "none":
        x = tl.load(x_ptr + row_offset * x_stride + column[None, :], mask=mask, other=0.0)
        product *= _gelu_derivative(x.to(tl.float32), ACTIVATION)
    tl.store(
        dx_ptr + row_offset * in_features + column[None, :],
        product.to(dx_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _add_product(
    product, grad_rows, weight_columns, layer_scale_ptr, row_mask, column_mask, weight_stride,
    out_features, EVEN_DEPTH: tl.constexpr, DEPTH_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, DEPTH_BLOCK)
    for start in range(0, out_features, DEPTH_BLOCK):
        n = start + depth
        weight_rows = weight_columns + n.to(tl.int64)[:, None] * weight_stride
        if EVEN_DEPTH:
            grad = tl.load(grad_rows + n[None, :], mask=row_mask[:, None], other=0.0)
            weight = tl.load(weight_rows, mask=column_mask[None, :], other=0.0)
        else:
            n_mask = n < out_features
            grad = tl.load(grad_rows + n[None, :], mask=row_mask[:, None] & n_mask[None, :], other=0.0)
            weight = tl.load(weight_rows, mask=n_mask[:, None] & column_mask[None, :], other=0.0)
        if layer_scale_ptr is not None:
            scale = tl.load(layer_scale_ptr + n, mask=n < out_features, other=0.0)
            grad = grad.to(tl.float32) * scale.to(tl.float32)[None, :]
        product = tl.dot(grad.to(weight.dtype), weight, product, input_precision=PRECISION)
    return product


@triton.jit
def _gelu_derivative(x, KIND: tl.constexpr):
    if KIND == "gelu":
        # Φ(x) + x φ(x)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        slope = 1.5957691216057308 + 0.21406444881780076 * x * x
        double = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        sigmoid = tl.sigmoid(double)
        # Not 1 - sigmoid, which has no digits left where sigmoid is near 1.
        return sigmoid + x * sigmoid * tl.sigmoid(-double) * slope


def input_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    gelu_of: Tensor | None = None,
    activation: str = "none",
    kept: Tensor | None = None,
    capacity: int | None = None,
    packed_grad: bool = False,
) -> Tensor:
    """[..., N] to [..., K], through weight [N, K] and the `activation` that was applied to `gelu_of` [..., K].

    Of one projection, or the sum of three's. The result has gelu_of's dtype where there is one, else weight's. With
    `kept` (see `drop_path.keep_samples`) it is packed like gelu_of; `capacity` says how large where there is none.
    grad is full, or `packed_grad`.
    """
    if gelu_of is not None:
        capacity = gelu_of.shape[0]
    grad = grads[0]
    out_features, in_features = weights[0].shape
    shape = (*grad.shape[:-1], in_features)
    if kept is not None and capacity is not None:
        shape = (capacity, *shape[1:])
    dx = torch.empty(shape, dtype=(weights[0] if gelu_of is None else gelu_of).dtype, device=grad.device)
    if not dx.numel():
        return dx
    if not out_features:
        return dx.zero_()
    tokens = 1
    if drop_path_scale is not None or kept is not None:
        tokens = grad.numel() // (grad.shape[0] * out_features)
    grads, weights = one_stride(grads), one_stride(weights)
    absent = (None,) * (3 - len(grads))
    gelu_of = None if gelu_of is None or activation == "none" else as_rows(gelu_of)
    rows = dx.numel() // in_features
    arch = hardware.architecture(grad)
    tile = settings.input_gradient(in_features, weights[0].element_size(), arch, activation)
    run.run(
        input_gradient_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(in_features, tile.columns),
        grad.device,
        *grads,
        *absent,
        *weights,
        *absent,
        dense(layer_scale),
        dense(drop_path_scale),
        kept,
        gelu_of,
        dx,
        rows,
        tokens,
        in_features,
        out_features,
        grads[0].stride(0),
        weights[0].stride(0),
        0 if gelu_of is None else gelu_of.stride(0),
        EVEN_DEPTH=out_features % tile.depth == 0,
        ACTIVATION=activation,
        PACKED_GRAD=packed_grad,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(weights[0].dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx
