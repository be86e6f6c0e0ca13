"""A weight times LayerScale, so that the gradient of a branch's input is a plain product."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import as_rows, dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.linear import settings


@triton.jit(**described("scaled_weight_kernel", lambda a: (a["out_features"], a["in_features"])))
def scaled_weight_kernel(
    weight_ptr,  # [out_features, in_features]
    layer_scale_ptr,  # [out_features]
    scaled_ptr,  # [out_features, in_features]
    largest_ptr,  # [1], float32
    weight_stride,
    out_features,
    in_features,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    """`scaled = layer_scale / largest * weight` with largest = max |layer_scale|, which goes into the product.

    A LayerScale of 1e-6 times a weight would be nothing in float16.
    """
    largest = tl.zeros([SCALE_BLOCK], dtype=tl.float32)
    for start in range(0, out_features, SCALE_BLOCK):
        n = start + tl.arange(0, SCALE_BLOCK)
        scale = tl.load(layer_scale_ptr + n, mask=n < out_features, other=0.0)
        largest = tl.maximum(largest, tl.abs(scale.to(tl.float32)))
    largest = tl.max(largest, axis=0)
    # Of nothing but zeros, or with an infinity: LayerScale as it is.
    largest = tl.where((largest > 0.0) & (largest < float("inf")), largest, 1.0)
    if tl.program_id(0) == 0:
        tl.store(largest_ptr, largest)

    column_tiles = tl.cdiv(in_features, COLUMN_BLOCK)
    n = tl.program_id(0) // column_tiles * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    k = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = (n < out_features)[:, None] & (k < in_features)[None, :]
    scale = tl.load(layer_scale_ptr + n, mask=n < out_features, other=0.0).to(tl.float32) / largest
    n = n.to(tl.int64)[:, None]
    weight = tl.load(weight_ptr + n * weight_stride + k[None, :], mask=mask, other=0.0).to(tl.float32)
    scaled = (weight * scale[:, None]).to(scaled_ptr.dtype.element_ty)
    tl.store(scaled_ptr + n * in_features + k[None, :], scaled, mask=mask)


def scaled_weight(weight: Tensor, layer_scale: Tensor) -> tuple[Tensor, Tensor]:
    """`layer_scale / c * weight`, [N, K] in weight's dtype, and c, float32 [1]: the largest of |layer_scale|."""
    scaled = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    largest = torch.empty(1, dtype=torch.float32, device=weight.device)
    out_features, in_features = weight.shape
    weight = as_rows(weight)
    tile = settings.ELEMENTWISE
    run.run(
        scaled_weight_kernel,
        triton.cdiv(out_features, tile.rows) * triton.cdiv(in_features, tile.columns),
        weight.device,
        weight,
        dense(layer_scale),
        scaled,
        largest,
        weight.stride(0),
        out_features,
        in_features,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        SCALE_BLOCK=1024,
        num_warps=tile.num_warps,
    )
    return scaled, largest
