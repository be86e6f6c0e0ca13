"""The GEMM family by the vendor's GEMM: what is fused with the product elsewhere is one launch before it and one after.

Wide rows are bound by arithmetic, where the vendor's GEMM is hard to beat. `settings.gemm` answers None for it, which
the shipped table never does: `deit-fast tune` measures it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import add_residual, approximation
from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.layer_norm.forward import layer_norm
from deit_fast.kernels.linear import settings


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described(
        "residual_kernel",
        lambda a: (a["rows"], a["columns"]),
        ("bias_ptr", "layer_scale_ptr", "drop_path_scale_ptr"),
    ),
)
def residual_kernel(
    product_ptr,  # [rows, columns]
    bias_ptr,  # [columns] or None
    residual_ptr,  # [rows, columns]
    layer_scale_ptr,  # [columns] or None
    drop_path_scale_ptr,  # [B] or None
    y_ptr,  # [rows, columns]
    rows,
    tokens,
    columns,
    residual_stride,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """`y = residual + drop_path_scale * layer_scale * (product + bias)`: the end of `linear_kernel`."""
    column_tiles = tl.cdiv(columns, COLUMN_BLOCK)
    row = (tl.program_id(0) // column_tiles).to(tl.int64) * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = (tl.program_id(0) % column_tiles) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row[:, None] * columns + column[None, :]
    branch = tl.load(product_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        branch += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    y = add_residual(
        branch,
        residual_ptr + row[:, None] * residual_stride + column[None, :],
        layer_scale_ptr,
        drop_path_scale_ptr,
        row,
        column,
        row_mask,
        column_mask,
        tokens,
    )
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


def gemm(
    x: Tensor,
    outputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: tuple[Tensor | None, Tensor | None],
    eps: float,
    prologue: str,
    activation: str,
) -> None:
    """Fills each of `outputs` [..., N] with `activation(prologue(x) @ weight.T + bias)`; x [rows, K]."""
    x = _operand(x, weights[0].dtype, norm, eps, prologue)
    for y, weight, bias in zip(outputs, weights, biases, strict=True):
        y = y.view(len(x), weight.shape[0])
        if bias is None:
            torch.mm(x, weight.T, out=y)
        else:
            torch.addmm(bias.to(y.dtype), x, weight.T, out=y)
        if activation != "none":
            torch.ops.aten.gelu_(y, approximate=approximation(activation))


def gemm_residual(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prologue: str,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    tokens: int,
) -> None:
    """Fills y with `residual + drop_path_scale * layer_scale * (prologue(x) @ weight.T + bias)`.

    x [rows, K], residual [rows, N]; `tokens` rows make a sample.
    """
    product = torch.mm(_operand(x, weight.dtype, (None, None), 0.0, prologue), weight.T)
    rows, columns = product.shape
    tile = settings.RESIDUAL
    run.run(
        residual_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),
        x.device,
        product,
        dense(bias),
        residual,
        dense(layer_scale),
        dense(drop_path_scale),
        y,
        rows,
        tokens,
        columns,
        residual.stride(0),
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )


def _operand(
    x: Tensor, dtype: torch.dtype, norm: tuple[Tensor | None, Tensor | None], eps: float, prologue: str
) -> Tensor:
    """What the GEMM multiplies: `prologue(x)` in `dtype`."""
    if prologue == "layer_norm":
        return layer_norm(x, *norm, eps, dtype)
    if prologue != "none":
        x = torch.nn.functional.gelu(x, approximate=approximation(prologue))
    return x.to(dtype)
