"""The GEMM family by the vendor's GEMM: what `linear_kernel` does after its product is one launch after it.

Wide rows are bound by arithmetic, where the vendor's GEMM is hard to beat. `settings.gemm` answers None for it, which
the shipped table never does: `deit-fast tune` measures it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.linear import settings
from deit_fast.kernels.linear.epilogue import epilogue


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described(
        "epilogue_kernel",
        lambda a: (a["rows"], a["columns"]),
        ("bias_ptr", "ACTIVATION", "activated_ptr", "layer_scale_ptr", "drop_path_scale_ptr", "residual_ptr"),
    ),
)
def epilogue_kernel(
    product_ptr,  # [rows, columns]
    bias_ptr,  # [columns] or None
    residual_ptr,  # [rows, columns] or None
    layer_scale_ptr,  # [columns] or None
    drop_path_scale_ptr,  # [B] or None
    y_ptr,  # [rows, columns]
    activated_ptr,  # [rows, columns] or None
    rows,
    tokens,
    columns,
    residual_stride,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """`y = residual + drop_path_scale * layer_scale * activation(product + bias)`: the end of `linear_kernel`."""
    column_tiles = tl.cdiv(columns, COLUMN_BLOCK)
    row = tl.program_id(0) // column_tiles * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    products = product_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    product = tl.load(products, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
    epilogue(
        product, row, column, row_mask, column_mask, bias_ptr, residual_ptr, layer_scale_ptr, drop_path_scale_ptr,
        y_ptr, activated_ptr, tokens, columns, residual_stride, ACTIVATION,
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
) -> None:
    """Fills y [..., N], and `activated` where it is given, as `linear_kernel` does; x [rows, K], residual [rows, N].

    `tokens` rows make a sample.
    """
    x = x.to(weight.dtype)
    rows, columns = len(x), weight.shape[0]
    if activation == "none" and residual is None:
        y = y.view(rows, columns)
        if bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias.to(y.dtype), x, weight.T, out=y)
        return
    tile = settings.EPILOGUE
    run.run(
        epilogue_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),
        x.device,
        torch.mm(x, weight.T),
        dense(bias),
        residual,
        dense(layer_scale),
        dense(drop_path_scale),
        y,
        activated,
        rows,
        tokens,
        columns,
        0 if residual is None else residual.stride(0),
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )
