"""The weight's gradient of the GEMM family, as it comes from the tokens.

G = gradᵀ x, with its rows' sum g = Σ grad, split over the tokens into partial sums. x is what was multiplied by the
weight: the activation, or x̂, the normalised rows, made by the launches before this one.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import sum_rows
from deit_fast.kernels.launching import hardware, run
from deit_fast.kernels.launching.layout import as_rows, one_stride
from deit_fast.kernels.launching.metadata import described_product
from deit_fast.kernels.linear import settings, vendor_gemm


def _weight_gradient_shape(arguments: dict) -> tuple[int, int, int]:
    return arguments["PROJECTIONS"] * arguments["out_features"], arguments["in_features"], arguments["rows"]


@triton.jit(
    do_not_specialize=["rows", "split_rows", "tokens"],
    **described_product("weight_gradient_kernel", _weight_gradient_shape, ("k_grad_ptr", "kept_ptr", "sum_ptr")),
)
def weight_gradient_kernel(
    grad_ptr,  # [rows, out_features]; of q where there are three
    k_grad_ptr,  # [rows, out_features] or None
    v_grad_ptr,  # [rows, out_features] or None
    x_ptr,  # [rows, in_features]
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
    OUT_BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of `G = gradᵀ x`, or of `g = Σ grad`, over one part of the rows.

    A split-K product (CUTLASS), whose parts a second launch adds in a fixed order. The programs past the last tile
    along in_features sum the gradient's rows instead. With `kept_ptr`, rows are those of kept samples, packed, and are
    split anew.
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
    if kept_ptr is not None:
        rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        splits = tl.num_programs(0) // (across * PROJECTIONS * out_tiles)
        split_rows = tl.cdiv(tl.cdiv(rows, splits), ROW_BLOCK) * ROW_BLOCK
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
            grad_ptr, None, None, None, first, rows, split_rows, n, n_mask, grad_stride, 0, ROW_BLOCK, OUT_BLOCK
        )
        tl.store(sum_ptr + part + n, total, mask=n_mask)
    else:
        k = tile_k * IN_BLOCK + tl.arange(0, IN_BLOCK)
        k_mask = k < in_features
        product = tl.zeros([OUT_BLOCK, IN_BLOCK], dtype=tl.float32)
        for start in range(first, tl.minimum(first + split_rows, rows), ROW_BLOCK):
            row = start + tl.arange(0, ROW_BLOCK)
            row_mask = row < rows
            row = row.to(tl.int64)
            # Transposed as it loads: mma.sync's copies then go to shared memory past the registers.
            grad = tl.load(
                grad_ptr + row[None, :] * grad_stride + n[:, None], mask=n_mask[:, None] & row_mask[None, :], other=0.0
            )
            x = tl.load(
                x_ptr + row[:, None] * x_stride + k[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0
            )
            product = tl.dot(grad, x, product, input_precision=PRECISION)
        products = product_ptr + (part + n)[:, None] * in_features + k[None, :]
        tl.store(products, product, mask=n_mask[:, None] & k_mask[None, :])


def weight_gradient_partials(
    grads: Sequence[Tensor], x: Tensor, *, kept: Tensor | None = None, need_sum: bool
) -> tuple[Tensor, Tensor | None]:
    """Partial sums of G [splits, P * N, K] and g [splits, P * N], float32, for P gradients [..., N] and x [..., K].

    All of one dtype. With `kept` (see `drop_path.keep_samples`) they are packed.
    """
    grad = grads[0]
    out_features, in_features = grad.shape[-1], x.shape[-1]
    tokens = grad.numel() // (grad.shape[0] * out_features) if kept is not None else 1
    grads, x = one_stride(grads), as_rows(x)
    absent = (None,) * (3 - len(grads))
    rows = x.shape[0]
    arch = hardware.architecture(x)
    # A setting that a kept samples' gradient does not have: the vendor's GEMM would add up what no sample has written.
    if kept is None and settings.vendor(
        "weight_gradient", "none", out_features, in_features, settings.rows_asked(rows), x.element_size(), arch,
        len(grads), False,
    ):  # fmt: skip
        return vendor_gemm.weight_gradient(grads, x, need_sum)
    tile = settings.weight_gradient(out_features, in_features, x.element_size(), arch)
    out_tiles = len(grads) * triton.cdiv(out_features, tile.rows)
    programs = out_tiles * (triton.cdiv(in_features, tile.columns) + need_sum)
    all_features = len(grads) * out_features
    operands = rows * (all_features + in_features) * x.element_size()
    splits = settings.splits(
        programs, rows, hardware.multiprocessors(x) * max(1, 8 // tile.num_warps),
        operands // (4 * all_features * in_features),
    )  # fmt: skip
    product = torch.empty((splits, all_features, in_features), dtype=torch.float32, device=x.device)
    total = torch.empty((splits, all_features), dtype=torch.float32, device=x.device) if need_sum else None
    run.run(
        weight_gradient_kernel,
        programs * splits,
        x.device,
        *grads,
        *absent,
        x,
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
        OUT_BLOCK=tile.rows,
        IN_BLOCK=tile.columns,
        ROW_BLOCK=tile.depth,
        PRECISION=hardware.dot_precision(x.dtype, arch),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return product, total
