"""The input's gradient of the GEMM family: one plain product, with GELU's derivative in its epilogue."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import gelu_and_derivative, halves, tile_of_program
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import as_rows, one_stride
from deit_fast.kernels.launching.metadata import described_product, linear_shape
from deit_fast.kernels.linear import settings, vendor_gemm


def _input_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    rows, out_features, in_features = linear_shape(arguments)
    return rows, in_features, out_features


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described_product(
        "input_gradient_kernel",
        _input_gradient_shape,
        ("k_weight_ptr", "layer_scale_ptr", "ACTIVATION", "activated_ptr", "kept_ptr"),
    ),
)
def input_gradient_kernel(
    grad_ptr,  # [rows, out_features]; of q where there are three
    k_grad_ptr,  # [rows, out_features] or None
    v_grad_ptr,  # [rows, out_features] or None
    weight_ptr,  # [out_features, in_features]
    k_weight_ptr,  # [out_features, in_features] or None
    v_weight_ptr,  # [out_features, in_features] or None
    layer_scale_ptr,  # [1], float32, or None: the weight's common factor
    kept_ptr,  # [1 + B] or None
    x_ptr,  # [rows, in_features] with an activation, else None
    activated_ptr,  # [rows, in_features] or None
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
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    EPILOGUE_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`dx = grad @ weight * activation'(x)`, or the sum of three such products; and activated = activation(x).

    The derivative of `linear_kernel` by what goes into its activation, or by LayerNorm's output. The weight's gradient
    multiplies by `activated`, which x gives here in passing.

    With `kept_ptr`, rows are those of kept samples; all tensors are packed.
    """
    if kept_ptr is not None:
        rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if tl.program_id(0) >= tl.cdiv(rows, ROW_BLOCK) * tl.cdiv(in_features, COLUMN_BLOCK):
            return
    tiles_m, tiles_n = tl.cdiv(rows, ROW_BLOCK), tl.cdiv(in_features, COLUMN_BLOCK)
    tile_m, tile_n = tile_of_program(tiles_m, tiles_n, GROUP)
    row = tile_m * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    row_offset = row.to(tl.int64)[:, None]
    first_column = tile_n * COLUMN_BLOCK
    column = first_column + tl.arange(0, COLUMN_BLOCK)

    product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    projections: tl.constexpr = 1 if k_grad_ptr is None else 3
    grads = (grad_ptr, k_grad_ptr, v_grad_ptr)
    weights = (weight_ptr, k_weight_ptr, v_weight_ptr)
    for i in tl.static_range(projections):
        product = _add_product(
            product, grads[i] + row_offset * grad_stride, weights[i] + column[None, :], row_mask,
            column < in_features, weight_stride, out_features, EVEN_DEPTH, DEPTH_BLOCK, PRECISION,
        )  # fmt: skip

    if layer_scale_ptr is not None:
        product *= tl.load(layer_scale_ptr)
    if ACTIVATION == "none":
        tl.store(
            dx_ptr + row_offset * in_features + column[None, :],
            product.to(dx_ptr.dtype.element_ty),
            mask=row_mask[:, None] & (column < in_features)[None, :],
        )
    else:
        _store_by_blocks(
            product, x_ptr + row_offset * x_stride, activated_ptr, dx_ptr, row_offset, row_mask, first_column,
            in_features, ACTIVATION, EPILOGUE_BLOCK,
        )  # fmt: skip


@triton.jit
def _add_product(
    product, grad_rows, weight_columns, row_mask, column_mask, weight_stride, out_features,
    EVEN_DEPTH: tl.constexpr, DEPTH_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
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
        product = tl.dot(grad, weight, product, input_precision=PRECISION)
    return product


@triton.jit
def _store_by_blocks(
    product, x_rows, activated_ptr, dx_ptr, row_offset, row_mask, first_column, in_features,
    ACTIVATION: tl.constexpr, EPILOGUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The epilogue, on EPILOGUE_BLOCK columns at a time: on a whole tile it has not the registers."""
    rows: tl.constexpr = product.shape[0]
    columns: tl.constexpr = product.shape[1]
    if columns > EPILOGUE_BLOCK:
        left, right = halves(product, rows, columns)
        _store_by_blocks(
            left, x_rows, activated_ptr, dx_ptr, row_offset, row_mask, first_column,
            in_features, ACTIVATION, EPILOGUE_BLOCK,
        )  # fmt: skip
        _store_by_blocks(
            right, x_rows, activated_ptr, dx_ptr, row_offset, row_mask, first_column + columns // 2,
            in_features, ACTIVATION, EPILOGUE_BLOCK,
        )  # fmt: skip
    else:
        column = first_column + tl.arange(0, columns)
        mask = row_mask[:, None] & (column < in_features)[None, :]
        offset = row_offset * in_features + column[None, :]
        x = tl.load(x_rows + column[None, :], mask=mask, other=0.0).to(tl.float32)
        short: tl.constexpr = dx_ptr.dtype.element_ty.primitive_bitwidth == 16
        activated, derivative = gelu_and_derivative(x, ACTIVATION, short)
        if activated_ptr is not None:
            tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)
        tl.store(dx_ptr + offset, (product * derivative).to(dx_ptr.dtype.element_ty), mask=mask)


def input_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    layer_scale: Tensor | None = None,
    gelu_of: Tensor | None = None,
    activation: str = "none",
    need_activated: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """[..., N] to [..., K], through weight [N, K] and the `activation` that was applied to `gelu_of` [..., K].

    Of one projection, or the sum of three's; `layer_scale`, [1], is a common factor (see `scaled_weight`). The result
    has gelu_of's dtype where there is one, else weight's. `activation(gelu_of)` comes with it, in weight's dtype, where
    there is an activation and `need_activated`. With `kept` (see `drop_path.keep_samples`) all of them are packed.
    """
    grad, dtype = grads[0], weights[0].dtype
    out_features, in_features = weights[0].shape
    shape = (*grad.shape[:-1], in_features)
    x = gelu_of if activation != "none" else None
    dx = torch.empty(shape, dtype=dtype if x is None else x.dtype, device=grad.device)
    activated = None if x is None or not need_activated else torch.empty(shape, dtype=dtype, device=grad.device)
    if not dx.numel():
        return dx, activated
    tokens = grad.numel() // (grad.shape[0] * out_features) if kept is not None else 1
    grads, weights = one_stride(grads), one_stride(weights)
    absent = (None,) * (3 - len(grads))
    x = None if x is None else as_rows(x)
    rows = dx.numel() // in_features
    arch = hardware.architecture(grad)
    asked = settings.rows_asked(rows)
    if settings.vendor(
        "input_gradient",
        activation,
        asked,
        in_features,
        out_features,
        dtype.itemsize,
        arch,
        len(grads),
        kept is not None,
    ):
        vendor_gemm.input_gradient(grads, weights, dx, layer_scale, x, activation, activated, tokens, kept)
        return dx, activated
    tile = settings.input_gradient(asked, in_features, dtype.itemsize, arch, activation, len(grads))
    run.run(
        input_gradient_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(in_features, tile.columns),
        grad.device,
        *grads,
        *absent,
        *weights,
        *absent,
        layer_scale,
        kept,
        x,
        activated,
        dx,
        rows,
        tokens,
        in_features,
        out_features,
        grads[0].stride(0),
        weights[0].stride(0),
        0 if x is None else x.stride(0),
        EVEN_DEPTH=out_features % tile.depth == 0,
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        EPILOGUE_BLOCK=settings.EPILOGUE_COLUMNS,
        GROUP=tiles.GROUP,
        PRECISION=hardware.dot_precision(dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx, activated
