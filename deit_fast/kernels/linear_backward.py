"""Gradients of the GEMM family.

The input's is one GEMM with everything else in its prologue and epilogue. The parameters' all come from one more,
G = (s grad)ᵀ f(x), with its rows' sum g = Σ s grad (s: drop path's factor), split over the tokens into partial
sums that a second launch adds in a fixed order and turns into the gradients. With f the activation before the layer:

    dW = layer_scale G        db = layer_scale g      dlayer_scale = Σ_k W G + b g

and with f(x) = x̂, the rows normalised on load, after a LayerNorm of weight γ and bias β:

    dW = γ G + g βᵀ           db = g                  dγ = Σ_n W G,  dβ = Wᵀ g

so that neither LayerNorm's output nor GELU's is kept, and no token is read for LayerScale, γ or β.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels import launch
from deit_fast.kernels.device import full_row, gelu, gelu_derivative, sum_rows, tile_of_program
from deit_fast.kernels.layer_norm_backward import column_sums
from deit_fast.kernels.layout import as_rows, dense, one_stride
from deit_fast.kernels.metadata import described, described_product, linear_shape

_GROUP = 8


def _input_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    rows, out_features, in_features = linear_shape(arguments)
    return rows, in_features, out_features


def _weight_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    return arguments["PROJECTIONS"] * arguments["out_features"], arguments["in_features"], arguments["rows"]


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described_product(
        "input_gradient_kernel",
        _input_gradient_shape,
        ("k_weight_ptr", "layer_scale_ptr", "ACTIVATION", "drop_path_scale_ptr", "kept_ptr"),
    ),
)
def input_gradient_kernel(
    grad_ptr,
    k_grad_ptr,
    v_grad_ptr,
    weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    layer_scale_ptr,
    drop_path_scale_ptr,
    kept_ptr,
    x_ptr,
    dx_ptr,
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
    product = _add_product(
        product, grad_ptr + grad_offset, weight_ptr + column[None, :], layer_scale_ptr, row_mask, column_mask,
        weight_stride, out_features, EVEN_DEPTH, DEPTH_BLOCK, PRECISION,
    )  # fmt: skip
    if k_grad_ptr is not None:
        product = _add_product(
            product, k_grad_ptr + grad_offset, k_weight_ptr + column[None, :], layer_scale_ptr, row_mask, column_mask,
            weight_stride, out_features, EVEN_DEPTH, DEPTH_BLOCK, PRECISION,
        )  # fmt: skip
        product = _add_product(
            product, v_grad_ptr + grad_offset, v_weight_ptr + column[None, :], layer_scale_ptr, row_mask, column_mask,
            weight_stride, out_features, EVEN_DEPTH, DEPTH_BLOCK, PRECISION,
        )  # fmt: skip

    mask = row_mask[:, None] & column_mask[None, :]
    if drop_path_scale_ptr is not None:
        scale = tl.load(drop_path_scale_ptr + grad_row // tokens, mask=row_mask, other=0.0)
        product *= scale.to(tl.float32)[:, None]
    if ACTIVATION != "none":
        x = tl.load(x_ptr + row_offset * x_stride + column[None, :], mask=mask, other=0.0)
        product *= gelu_derivative(x.to(tl.float32), ACTIVATION)
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


@triton.jit(
    do_not_specialize=["rows", "split_rows", "tokens"],
    **described_product(
        "weight_gradient_kernel",
        _weight_gradient_shape,
        ("rstd_ptr", "ACTIVATION", "k_grad_ptr", "drop_path_scale_ptr", "kept_ptr", "sum_ptr"),
    ),
)
def weight_gradient_kernel(
    grad_ptr,
    k_grad_ptr,
    v_grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    drop_path_scale_ptr,
    kept_ptr,
    product_ptr,
    sum_ptr,
    rows,
    split_rows,
    tokens,
    in_features,
    out_features,
    grad_stride,
    x_stride,
    PROJECTIONS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of G over one part of the rows.

    The programs past the last tile along in_features sum the gradient's rows instead. With `kept_ptr`, rows are those
    of kept samples, split anew; grad is full and x packed, or with `mean_ptr` grad, mean and rstd packed and x full.
    product: [splits, PROJECTIONS * out_features, in_features]; sum: [splits, PROJECTIONS * out_features].
    """
    out_tiles = tl.cdiv(out_features, OUT_BLOCK)
    in_tiles = tl.cdiv(in_features, IN_BLOCK)
    across = in_tiles
    if sum_ptr is not None:
        across += 1
    tile_k = tl.program_id(0) % across
    tile_n = tl.program_id(0) // across % (PROJECTIONS * out_tiles)
    split = tl.program_id(0) // (across * PROJECTIONS * out_tiles)
    projection = tile_n // out_tiles
    kept_of_grad = kept_ptr
    if kept_ptr is not None:
        rows = tl.load(kept_ptr) * tokens
        splits = tl.num_programs(0) // (across * PROJECTIONS * out_tiles)
        split_rows = tl.cdiv(tl.cdiv(rows, splits), ROW_BLOCK) * ROW_BLOCK
        if mean_ptr is not None:
            kept_of_grad = None
    if PROJECTIONS > 1:
        if projection == 1:
            grad_ptr = k_grad_ptr
        elif projection == 2:
            grad_ptr = v_grad_ptr

    n = (tile_n % out_tiles) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    n_mask = n < out_features
    first = split * split_rows
    part = split.to(tl.int64) * (PROJECTIONS * out_features) + projection * out_features
    if sum_ptr is not None and tile_k == in_tiles:
        total, _ = sum_rows(
            grad_ptr, None, None, None, drop_path_scale_ptr, kept_of_grad, first, rows, split_rows, tokens, n, n_mask,
            grad_stride, 0, ROW_BLOCK, OUT_BLOCK,
        )  # fmt: skip
        tl.store(sum_ptr + part + n, total, mask=n_mask)
    else:
        k = tile_k * IN_BLOCK + tl.arange(0, IN_BLOCK)
        k_mask = k < in_features
        # What is done to x is done once where x is turned. But a turned float32 x would be copied an element at a time.
        TURN_X: tl.constexpr = x_ptr.dtype.element_ty == DTYPE or x_ptr.dtype.element_ty != tl.float32
        if TURN_X:
            product = tl.zeros([IN_BLOCK, OUT_BLOCK], dtype=tl.float32)
        else:
            product = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
        for start in range(0, tl.minimum(split_rows, rows - first), ROW_BLOCK):
            row = first + start + tl.arange(0, ROW_BLOCK)
            row_mask = row < rows
            x_row = row
            grad_row = row
            if kept_ptr is not None:
                if mean_ptr is not None:
                    x_row = full_row(kept_ptr, row, row_mask, tokens)
                else:
                    grad_row = full_row(kept_ptr, row, row_mask, tokens)
            x_rows = x_ptr + x_row.to(tl.int64)[:, None] * x_stride
            x = tl.load(x_rows + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            grads = grad_ptr + grad_row.to(tl.int64)[:, None] * grad_stride + n[None, :]
            grad = tl.load(grads, mask=row_mask[:, None] & n_mask[None, :], other=0.0)
            if mean_ptr is not None:
                mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
                rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
                x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            elif ACTIVATION != "none":
                x = gelu(x.to(tl.float32), ACTIVATION)
            if drop_path_scale_ptr is not None:
                scale = tl.load(drop_path_scale_ptr + grad_row // tokens, mask=row_mask, other=0.0)
                x = x.to(tl.float32) * scale.to(tl.float32)[:, None]
            if TURN_X:
                product = tl.dot(tl.trans(x.to(DTYPE)), grad.to(DTYPE), product, input_precision=PRECISION)
            else:
                product = tl.dot(tl.trans(grad.to(DTYPE)), x.to(DTYPE), product, input_precision=PRECISION)
        if TURN_X:
            products = product_ptr + (part + n)[None, :] * in_features + k[:, None]
            tl.store(products, product, mask=k_mask[:, None] & n_mask[None, :])
        else:
            products = product_ptr + (part + n)[:, None] * in_features + k[None, :]
            tl.store(products, product, mask=n_mask[:, None] & k_mask[None, :])


@triton.jit(
    **described(
        "finish_linear_kernel",
        lambda a: (a["SPLITS"], a["out_features"], a["in_features"]),
        ("weight_grad_ptr", "bias_grad_ptr", "layer_scale_grad_ptr", "layer_scale_ptr"),
    )
)
def finish_linear_kernel(
    product_ptr,
    sum_ptr,
    weight_ptr,
    bias_ptr,
    layer_scale_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    layer_scale_grad_ptr,
    weight_stride,
    split_stride,
    in_features,
    out_features,
    SPLITS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    """OUT_BLOCK whole rows of the gradients of weight, bias and LayerScale from their partial sums."""
    n = tl.program_id(0) * OUT_BLOCK + tl.arange(0, OUT_BLOCK)
    n_mask = n < out_features
    if layer_scale_ptr is not None:
        layer_scale = tl.load(layer_scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    of_scale = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    for start in range(0, in_features, IN_BLOCK):
        k = start + tl.arange(0, IN_BLOCK)
        mask = n_mask[:, None] & (k < in_features)[None, :]
        offset = n.to(tl.int64)[:, None] * in_features + k[None, :]
        product = _sum_splits(product_ptr + offset, mask, split_stride, SPLITS)
        if layer_scale_grad_ptr is not None:
            weight = tl.load(weight_ptr + n.to(tl.int64)[:, None] * weight_stride + k[None, :], mask=mask, other=0.0)
            of_scale += weight.to(tl.float32) * product
        if weight_grad_ptr is not None:
            if layer_scale_ptr is not None:
                product *= layer_scale[:, None]
            tl.store(weight_grad_ptr + offset, product.to(weight_grad_ptr.dtype.element_ty), mask=mask)
    if sum_ptr is not None:
        total = _sum_splits(sum_ptr + n, n_mask, out_features, SPLITS)
    if layer_scale_grad_ptr is not None:
        scale_grad = tl.sum(of_scale, axis=1)
        if bias_ptr is not None:
            scale_grad += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32) * total
        tl.store(layer_scale_grad_ptr + n, scale_grad.to(layer_scale_grad_ptr.dtype.element_ty), mask=n_mask)
    if bias_grad_ptr is not None:
        if layer_scale_ptr is not None:
            total *= layer_scale
        tl.store(bias_grad_ptr + n, total.to(bias_grad_ptr.dtype.element_ty), mask=n_mask)


@triton.jit(
    **described(
        "finish_layer_norm_linear_kernel",
        lambda a: (a["SPLITS"], a["PROJECTIONS"] * a["out_features"], a["in_features"]),
        ("k_weight_ptr", "weight_grad_ptr", "bias_grad_ptr", "norm_weight_grad_ptr", "norm_bias_grad_ptr"),
    )
)
def finish_layer_norm_linear_kernel(
    product_ptr,
    sum_ptr,
    weight_ptr,
    k_weight_ptr,
    v_weight_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    weight_grad_ptr,
    k_weight_grad_ptr,
    v_weight_grad_ptr,
    bias_grad_ptr,
    k_bias_grad_ptr,
    v_bias_grad_ptr,
    norm_weight_grad_ptr,
    norm_bias_grad_ptr,
    weight_stride,
    split_stride,
    in_features,
    out_features,
    PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    """IN_BLOCK whole columns of the gradients of weight, bias and LayerNorm's parameters from their partial sums."""
    k = tl.program_id(0) * IN_BLOCK + tl.arange(0, IN_BLOCK)
    k_mask = k < in_features
    of_norm_weight = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    of_norm_bias = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
    of_norm_weight, of_norm_bias = _finish_projection(
        of_norm_weight, of_norm_bias, product_ptr, sum_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr,
        weight_grad_ptr, bias_grad_ptr, norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
        split_stride, in_features, out_features, 0, PROJECTIONS, SPLITS, OUT_BLOCK,
    )  # fmt: skip
    if PROJECTIONS > 1:
        of_norm_weight, of_norm_bias = _finish_projection(
            of_norm_weight, of_norm_bias, product_ptr, sum_ptr, k_weight_ptr, norm_weight_ptr, norm_bias_ptr,
            k_weight_grad_ptr, k_bias_grad_ptr, norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
            split_stride, in_features, out_features, 1, PROJECTIONS, SPLITS, OUT_BLOCK,
        )  # fmt: skip
        of_norm_weight, of_norm_bias = _finish_projection(
            of_norm_weight, of_norm_bias, product_ptr, sum_ptr, v_weight_ptr, norm_weight_ptr, norm_bias_ptr,
            v_weight_grad_ptr, v_bias_grad_ptr, norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
            split_stride, in_features, out_features, 2, PROJECTIONS, SPLITS, OUT_BLOCK,
        )  # fmt: skip
    if norm_weight_grad_ptr is not None:
        total = tl.sum(of_norm_weight, axis=0)
        tl.store(norm_weight_grad_ptr + k, total.to(norm_weight_grad_ptr.dtype.element_ty), mask=k_mask)
    if norm_bias_grad_ptr is not None:
        total = tl.sum(of_norm_bias, axis=0)
        tl.store(norm_bias_grad_ptr + k, total.to(norm_bias_grad_ptr.dtype.element_ty), mask=k_mask)


@triton.jit
def _finish_projection(
    of_norm_weight, of_norm_bias, product_ptr, sum_ptr, weight_ptr, norm_weight_ptr, norm_bias_ptr,
    weight_grad_ptr, bias_grad_ptr, norm_weight_grad_ptr, norm_bias_grad_ptr, k, k_mask, weight_stride,
    split_stride, in_features, out_features, PROJECTION: tl.constexpr, PROJECTIONS: tl.constexpr,
    SPLITS: tl.constexpr, OUT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds W ⊙ G and W ⊙ g to `of_norm_weight` and `of_norm_bias`, to be summed over their rows."""
    if norm_weight_ptr is not None:
        norm_weight = tl.load(norm_weight_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        norm_bias = tl.load(norm_bias_ptr + k, mask=k_mask, other=0.0).to(tl.float32)
    for start in range(0, out_features, OUT_BLOCK):
        n = start + tl.arange(0, OUT_BLOCK)
        n_mask = n < out_features
        mask = n_mask[:, None] & k_mask[None, :]
        n_offset = n.to(tl.int64)[:, None]
        products = product_ptr + (n_offset + PROJECTION * out_features) * in_features + k[None, :]
        product = _sum_splits(products, mask, split_stride, SPLITS)
        if sum_ptr is not None:
            total = _sum_splits(sum_ptr + PROJECTION * out_features + n, n_mask, PROJECTIONS * out_features, SPLITS)
        if norm_weight_grad_ptr is not None or norm_bias_grad_ptr is not None:
            weight = tl.load(weight_ptr + n_offset * weight_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
            if norm_weight_grad_ptr is not None:
                of_norm_weight += weight * product
            if norm_bias_grad_ptr is not None:
                of_norm_bias += weight * total[:, None]
        if weight_grad_ptr is not None:
            if norm_weight_ptr is not None:
                product *= norm_weight[None, :]
            if norm_bias_ptr is not None:
                product += total[:, None] * norm_bias[None, :]
            product = product.to(weight_grad_ptr.dtype.element_ty)
            tl.store(weight_grad_ptr + n_offset * in_features + k[None, :], product, mask=mask)
        if bias_grad_ptr is not None and tl.program_id(0) == 0:
            tl.store(bias_grad_ptr + n, total.to(bias_grad_ptr.dtype.element_ty), mask=n_mask)
    return of_norm_weight, of_norm_bias


@triton.jit
def _sum_splits(pointers, mask, stride, SPLITS: tl.constexpr):
    """Unrolled, so that all loads are under way at once."""
    total = tl.load(pointers, mask=mask, other=0.0)
    for _ in tl.static_range(1, SPLITS):
        pointers += stride
        total += tl.load(pointers, mask=mask, other=0.0)
    return total


def input_gradient(
    grad: Tensor,
    weight: Tensor,
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

    The result has gelu_of's dtype where there is one, else weight's. With `kept` (see `drop_path.keep_samples`) it
    is packed like gelu_of; `capacity` says how large where there is none. grad is full, or `packed_grad`.
    """
    if gelu_of is not None:
        capacity = gelu_of.shape[0]
    return _input_gradient(
        (grad,), (weight,), layer_scale, drop_path_scale, gelu_of, activation, kept, capacity, packed_grad
    )


def input_gradient_qkv(grads: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The sum of three projections' input gradients, in weights' dtype."""
    return _input_gradient(tuple(grads), tuple(weights))


def _input_gradient(
    grads,
    weights,
    layer_scale=None,
    drop_path_scale=None,
    gelu_of=None,
    activation="none",
    kept=None,
    capacity=None,
    packed_grad=False,
) -> Tensor:
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
    gelu_of = None if activation == "none" else as_rows(gelu_of)
    rows = dx.numel() // in_features
    arch = launch.architecture(grad)
    tile = launch.input_gradient(in_features, weights[0].element_size(), arch, activation)
    launch.run(
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
        GROUP=_GROUP,
        PRECISION=launch.dot_precision(weights[0].dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dx


_TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def _weight_gradient(
    grads: Sequence[Tensor],
    x: Tensor,
    dtype: torch.dtype,
    *,
    drop_path_scale: Tensor | None = None,
    activation: str = "none",
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    kept: Tensor | None = None,
    need_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """Partial sums of G [splits, P * N, K] and g [splits, P * N], float32, for P gradients of N columns.

    Operands are multiplied in `dtype`. With mean and rstd of its rows, x is normalised on load.
    With `kept`, grad is full and x packed, or with mean and rstd grad packed and x full.
    """
    grad = grads[0]
    out_features, in_features = grad.shape[-1], x.shape[-1]
    tokens = 1
    if drop_path_scale is not None or kept is not None:
        tokens = grad.numel() // (grad.shape[0] * out_features)
    grads, x = one_stride(grads), as_rows(x)
    absent = (None,) * (3 - len(grads))
    rows = (x if mean is None else grads[0]).shape[0]
    arch = launch.architecture(x)
    tile = launch.weight_gradient(out_features, in_features, dtype.itemsize, x.element_size(), arch, activation)
    if kept is not None:
        tile = launch.kept_weight_gradient(tile, (grad if mean is None else x).element_size(), arch)
    tiles = len(grads) * triton.cdiv(out_features, tile.rows) * triton.cdiv(in_features, tile.columns)
    splits = launch.splits(tiles, rows, launch.multiprocessors(x))
    programs = tiles + (len(grads) * triton.cdiv(out_features, tile.rows) if need_sum else 0)
    all_features = len(grads) * out_features
    product = torch.empty((splits, all_features, in_features), dtype=torch.float32, device=x.device)
    total = torch.empty((splits, all_features), dtype=torch.float32, device=x.device) if need_sum else None
    launch.run(
        weight_gradient_kernel,
        programs * splits,
        x.device,
        *grads,
        *absent,
        x,
        mean,
        rstd,
        dense(drop_path_scale),
        kept,
        product,
        total,
        rows,
        triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth,
        tokens,
        in_features,
        out_features,
        grads[0].stride(0),
        x.stride(0),
        PROJECTIONS=len(grads),
        ACTIVATION=activation,
        DTYPE=_TRITON_DTYPES[dtype],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        ROW_BLOCK=tile.depth,
        PRECISION=launch.dot_precision(dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return product, total


def linear_parameter_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    activation: str = "none",
    needs: Sequence[bool] = (True, True, True),
    kept: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of weight, bias and layer_scale, each in its parameter's dtype; None where absent or not needed.

    grad [..., N] is that of `drop_path_scale * layer_scale * (activation(x) @ weight.T + bias)`. With `kept` (see
    `drop_path.keep_samples`) grad is full and x packed.
    """
    outputs = _allocate((weight, bias, layer_scale), needs)
    of_weight, of_bias, of_layer_scale = outputs
    if not grad.numel() or not x.numel():
        return _without_tokens(outputs)
    if of_weight is None and of_layer_scale is None:
        if of_bias is not None:
            of_bias = column_sums(grad, bias.dtype, scale=layer_scale, drop_path_scale=drop_path_scale, kept=kept)
        return [None, of_bias, None]
    product, total = _weight_gradient(
        (grad,),
        x,
        weight.dtype,
        drop_path_scale=drop_path_scale,
        activation=activation,
        kept=kept,
        need_sum=of_bias is not None or (of_layer_scale is not None and bias is not None),
    )
    weight = as_rows(weight)
    out_features, in_features = weight.shape
    tile = launch.FINISH_LINEAR
    launch.run(
        finish_linear_kernel,
        triton.cdiv(out_features, tile.rows),
        grad.device,
        product,
        total,
        weight,
        dense(bias),
        dense(layer_scale),
        *outputs,
        weight.stride(0),
        product.stride(0),
        in_features,
        out_features,
        SPLITS=product.shape[0],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return outputs


def layer_norm_linear_parameter_gradients(
    grads: Sequence[Tensor],
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    needs: Sequence[bool] | None = None,
    kept: Tensor | None = None,
) -> list[Tensor | None]:
    """Gradients of norm_weight, norm_bias, weights and biases, in this order; None where absent or not needed.

    Of one projection `LN(x) @ weight.T + bias`, or three of the same shape. mean, rstd: of x's rows, as
    `layer_norm_backward` and `row_statistics` return them. With `kept` (see `drop_path.keep_samples`) x is full,
    grads, mean and rstd are packed.
    """
    parameters = (norm_weight, norm_bias, *weights, *biases)
    outputs = _allocate(parameters, needs or [True] * len(parameters))
    projections = len(weights)
    of_norm, of_weights, of_biases = outputs[:2], outputs[2 : 2 + projections], outputs[2 + projections :]
    if not grads[0].numel() or not x.numel():
        return _without_tokens(outputs)
    if all(o is None for o in (*of_norm, *of_weights)):
        sums = [
            None if b is None else column_sums(g, b.dtype, kept=kept, packed_grad=True)
            for g, b in zip(grads, of_biases, strict=True)
        ]
        return [None] * (2 + projections) + sums
    of_norm_bias = of_norm[1]
    product, total = _weight_gradient(
        grads,
        x,
        weights[0].dtype,
        mean=mean,
        rstd=rstd,
        kept=kept,
        need_sum=any(b is not None for b in (norm_bias, of_norm_bias, *of_biases)),
    )
    weights = one_stride(weights)
    absent = (None,) * (3 - projections)
    out_features, in_features = weights[0].shape
    tile = launch.finish_layer_norm_linear(launch.architecture(x))
    launch.run(
        finish_layer_norm_linear_kernel,
        triton.cdiv(in_features, tile.columns),
        x.device,
        product,
        total,
        *weights,
        *absent,
        dense(norm_weight),
        dense(norm_bias),
        *of_weights,
        *absent,
        *of_biases,
        *absent,
        *of_norm,
        weights[0].stride(0),
        product.stride(0),
        in_features,
        out_features,
        PROJECTIONS=projections,
        SPLITS=product.shape[0],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
    return outputs


def _allocate(parameters: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    return [
        torch.empty(p.shape, dtype=p.dtype, device=p.device) if need and p is not None else None
        for p, need in zip(parameters, needs, strict=True)
    ]


def _without_tokens(outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if o is None else o.zero_() for o in outputs]
