"""The weight's gradient of the GEMM family, as it comes from the tokens.

G = (s grad)ᵀ f(x), with its rows' sum g = Σ s grad (s: drop path's factor; f: the activation before the layer, or
x̂, the rows normalised on load), split over the tokens into partial sums.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import full_row, gelu, sum_rows
from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.layout import TRITON_DTYPES, as_rows, dense, one_stride
from deit_fast.kernels.launching.metadata import described_product
from deit_fast.kernels.linear import settings


def _weight_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    return arguments["PROJECTIONS"] * arguments["out_features"], arguments["in_features"], arguments["rows"]


@triton.jit(
    do_not_specialize=["rows", "split_rows", "tokens"],
    **described_product(
        "weight_gradient_kernel",
        _weight_gradient_shape,
        ("rstd_ptr", "ACTIVATION", "k_grad_ptr", "drop_path_scale_ptr", "kept_ptr", "sum_ptr"),
    ),
)
def weight_gradient_kernel(
    grad_ptr,  # [rows, out_features]; of q where there are three
    k_grad_ptr,  # [rows, out_features] or None
    v_grad_ptr,  # [rows, out_features] or None
    x_ptr,  # [rows, in_features]
    mean_ptr,  # [rows], float32, or None
    rstd_ptr,  # [rows], float32, or None
    drop_path_scale_ptr,  # [B] or None
    kept_ptr,  # [1 + B] or None
    product_ptr,  # [splits, PROJECTIONS * out_features, in_features], float32
    sum_ptr,  # [splits, PROJECTIONS * out_features], float32, or None
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
    """A tile of `G = (s grad)ᵀ f(x)`, or of `g = Σ s grad`, over one part of the rows; s and f as above.

    A split-K product (CUTLASS), whose parts a second launch adds in a fixed order. The programs past the last tile
    along in_features sum the gradient's rows instead. With `kept_ptr`, rows are those of kept samples, split anew; grad
    is full and x packed, or with `mean_ptr` grad, mean and rstd packed and x full.
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
        # Transposing x does its element-wise work once. A float32 x would then be copied one element at a time: there
        # grad is transposed.
        TRANSPOSE_X: tl.constexpr = x_ptr.dtype.element_ty == DTYPE or x_ptr.dtype.element_ty != tl.float32
        if TRANSPOSE_X:
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
            if TRANSPOSE_X:
                product = tl.dot(tl.trans(x.to(DTYPE)), grad.to(DTYPE), product, input_precision=PRECISION)
            else:
                product = tl.dot(tl.trans(grad.to(DTYPE)), x.to(DTYPE), product, input_precision=PRECISION)
        if TRANSPOSE_X:
            products = product_ptr + (part + n)[None, :] * in_features + k[:, None]
            tl.store(products, product, mask=k_mask[:, None] & n_mask[None, :])
        else:
            products = product_ptr + (part + n)[:, None] * in_features + k[None, :]
            tl.store(products, product, mask=n_mask[:, None] & k_mask[None, :])


def weight_gradient_partials(
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
    arch = hardware.architecture(x)
    tile = settings.weight_gradient(out_features, in_features, dtype.itemsize, x.element_size(), arch, activation)
    if kept is not None:
        tile = settings.kept_weight_gradient(tile, (grad if mean is None else x).element_size(), arch)
    tiles = len(grads) * triton.cdiv(out_features, tile.rows) * triton.cdiv(in_features, tile.columns)
    splits = settings.splits(tiles, rows, hardware.multiprocessors(x))
    programs = tiles + (len(grads) * triton.cdiv(out_features, tile.rows) if need_sum else 0)
    all_features = len(grads) * out_features
    product = torch.empty((splits, all_features, in_features), dtype=torch.float32, device=x.device)
    total = torch.empty((splits, all_features), dtype=torch.float32, device=x.device) if need_sum else None
    run.run(
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
        DTYPE=TRITON_DTYPES[dtype],
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        ROW_BLOCK=tile.depth,
        PRECISION=hardware.dot_precision(dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return product, total
