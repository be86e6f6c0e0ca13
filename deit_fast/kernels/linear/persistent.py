"""The GEMM family's product by persistent programs: one a multiprocessor, which takes tile after tile.

Its operands come through tensor descriptors, and while a tile has its epilogue the next one's are on their way. Nobody
has measured it yet, so no shipped setting has it (`settings.persistent`); `deit-fast tune` tries it.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import nth_tile
from deit_fast.kernels.launching import hardware, run, tiles
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described_product
from deit_fast.kernels.launching.settings import Tile
from deit_fast.kernels.linear.epilogue import epilogue_by_quarters


def takes(x: Tensor, weights: Sequence[Tensor], kept: Tensor | None, arch: str) -> bool:
    """Whether tensor descriptors can be had of these operands, of `linear_kernel`; each is [rows, columns].

    Not of three projections, which a program would choose among, nor of kept samples, whose number is on the device.
    """
    operands = (x, *weights)
    return (
        arch in hardware.TENSOR_DESCRIPTORS
        and len(weights) == 1
        and kept is None
        and all(operand.dtype is x.dtype and _describable(operand) for operand in operands)
    )


def _describable(operand: Tensor) -> bool:
    """What cuTensorMapEncodeTiled of CUDA's driver asks, of 16 bits an element: addresses in whole 16 bytes."""
    stride, columns = operand.stride(0), operand.shape[1]
    return operand.itemsize == 2 and stride % 8 == 0 and stride >= columns > 0 and operand.data_ptr() % 16 == 0


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described_product(
        "persistent_linear_kernel",
        lambda a: (a["rows"], a["out_features"], a["in_features"]),
        ("bias_ptr", "ACTIVATION", "activated_ptr", "layer_scale_ptr", "drop_path_scale_ptr", "residual_ptr"),
    ),
)
def persistent_linear_kernel(
    x_ptr,  # [rows, in_features]
    weight_ptr,  # [out_features, in_features]
    bias_ptr,  # [out_features] or None
    residual_ptr,  # [rows, out_features] or None
    layer_scale_ptr,  # [out_features] or None
    drop_path_scale_ptr,  # [B] or None
    y_ptr,  # [rows, out_features]
    activated_ptr,  # [rows, out_features] or None
    rows,
    tokens,
    in_features,
    out_features,
    x_stride,
    weight_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
    DEPTH_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `linear_kernel`, of one product and all samples.

    Persistent, with descriptors that the programs build, as in Triton's tutorial of persistent products. What a tile
    has beyond a tensor's edge is loaded as zeros.
    """
    tl.assume(in_features > 0)  # or all is compiled once more, for tiles without products
    x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, in_features], [x_stride, 1], [ROW_BLOCK, DEPTH_BLOCK])
    weight_tiles = tl.make_tensor_descriptor(
        weight_ptr, [out_features, in_features], [weight_stride, 1], [COLUMN_BLOCK, DEPTH_BLOCK]
    )
    tiles_m, tiles_n = tl.cdiv(rows, ROW_BLOCK), tl.cdiv(out_features, COLUMN_BLOCK)
    # One loop with the one within it, so that loads of the next tile begin before this one ends.
    for n in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = nth_tile(n, tiles_m, tiles_n, GROUP)
        first_row, first_column = tile_m * ROW_BLOCK, tile_n * COLUMN_BLOCK
        product = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
        for start in range(0, in_features, DEPTH_BLOCK):
            x = x_tiles.load([first_row, start])
            weight = weight_tiles.load([first_column, start])
            product = tl.dot(x, weight.T, product)
        row = first_row + tl.arange(0, ROW_BLOCK)
        epilogue_by_quarters(
            product, row, first_column, row < rows, bias_ptr, residual_ptr, layer_scale_ptr, drop_path_scale_ptr,
            y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION,
        )  # fmt: skip


def linear(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    activated: Tensor | None,
    residual: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    tokens: int,
    tile: Tile,
) -> None:
    """Fills y [..., N], and `activated` where it is given, as `linear_kernel` does; x [rows, K], residual [rows, N].

    Of operands that it `takes`. `tokens` rows make a sample.
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    run.run(
        persistent_linear_kernel,
        min(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns), hardware.multiprocessors(x)),
        x.device,
        x,
        weight,
        dense(bias),
        residual,
        dense(layer_scale),
        dense(drop_path_scale),
        y,
        activated,
        rows,
        tokens,
        depth,
        columns,
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        DEPTH_BLOCK=tile.depth,
        GROUP=tiles.GROUP,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
