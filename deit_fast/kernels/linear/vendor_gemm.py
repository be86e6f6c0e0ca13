"""The GEMM family by the vendor's GEMM: what our kernels do besides their product is one launch after it.

Wide rows are bound by arithmetic, where the vendor's GEMM is hard to beat. `settings.vendor` says where it computes.

It knows nothing of the samples that drop path keeps, and multiplies all that packed tensors have room for. Where rows
of the product are tokens, what comes of the rest is never read. A weight's gradient is a sum over the tokens, and what
lies in that room would go into it: with `kept`, our kernel computes it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.device import copy_dropped, full_row, gelu_and_derivative
from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described
from deit_fast.kernels.layer_norm.backward import column_sums
from deit_fast.kernels.linear import settings
from deit_fast.kernels.linear.epilogue import epilogue

# What it has computed in this process, "input_gradient 3072×768", by its weight, in the order of the first calls.
used: dict[str, None] = {}


def multiply(product: str, a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
    """Fills out [rows, columns] with `a @ b + plus`; a: [rows, depth], b: [depth, columns], plus: [columns] or `out`.

    Without `plus`, out may be float32 where a and b have 16 bits. product: as `settings.vendor` is asked.
    """
    shape = out.shape if product == "weight_gradient" else b.shape
    used[f"{product} {shape[0]}×{shape[1]}"] = None
    if plus is not None:
        torch.addmm(plus, a, b, out=out)
    elif out.dtype is a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        # The CPU has no such product.
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described(
        "epilogue_kernel",
        lambda a: (a["rows"], a["columns"]),
        (
            "bias_ptr",
            "ACTIVATION",
            "activated_ptr",
            "layer_scale_ptr",
            "drop_path_scale_ptr",
            "residual_ptr",
            "kept_ptr",
        ),
    ),
)
def epilogue_kernel(
    product_ptr,  # [rows, columns]; with kept, [capacity * tokens, columns]
    bias_ptr,  # [columns] or None
    residual_ptr,  # [rows, columns] or None
    layer_scale_ptr,  # [columns] or None
    drop_path_scale_ptr,  # [B] or None
    kept_ptr,  # [1 + B] or None
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
    """`y = residual + drop_path_scale * layer_scale * activation(product + bias)`: the end of `linear_kernel`.

    With `kept_ptr`, as there: the product is packed, and so is y, unless there is a residual.
    """
    column_tiles = tl.cdiv(columns, COLUMN_BLOCK)
    first = tl.program_id(0) // column_tiles * ROW_BLOCK
    row = first + tl.arange(0, ROW_BLOCK)
    row_mask = row < rows
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    column_mask = column < columns
    if kept_ptr is not None:
        kept_rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if residual_ptr is not None:
            dropped, last = tl.maximum(first, kept_rows), tl.minimum(first + ROW_BLOCK, rows)
            copy_dropped(
                residual_ptr, y_ptr, kept_ptr, dropped, last, tokens, column, column_mask, residual_stride, columns
            )  # fmt: skip
        if first >= kept_rows:
            return
        row_mask = row < kept_rows
    products = product_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    product = tl.load(products, mask=row_mask[:, None] & column_mask[None, :], other=0.0).to(tl.float32)
    if kept_ptr is not None and residual_ptr is not None:
        row = full_row(kept_ptr, row, row_mask, tokens)
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
    kept: Tensor | None = None,
) -> None:
    """Fills y [..., N], and `activated` where it is given, as `linear_kernel` does; x [rows, K], residual [rows, N].

    `tokens` rows make a sample.
    """
    x = x.to(weight.dtype)
    columns = weight.shape[0]
    rows = y.numel() // columns
    if activation == "none" and residual is None:
        multiply("linear", x, weight.T, y.view(rows, columns), None if bias is None else bias.to(y.dtype))
        return
    product = torch.empty((len(x), columns), dtype=weight.dtype, device=x.device)
    multiply("linear", x, weight.T, product)
    tile = settings.EPILOGUE
    run.run(
        epilogue_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),
        x.device,
        product,
        dense(bias),
        residual,
        dense(layer_scale),
        dense(drop_path_scale),
        kept,
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


@triton.jit(
    do_not_specialize=["rows", "tokens"],
    **described(
        "input_gradient_epilogue_kernel",
        lambda a: (a["rows"], a["columns"]),
        ("layer_scale_ptr", "ACTIVATION", "activated_ptr", "kept_ptr"),
    ),
)
def input_gradient_epilogue_kernel(
    product_ptr,  # [rows, columns]
    layer_scale_ptr,  # [1], float32, or None: the weight's common factor
    kept_ptr,  # [1 + B] or None
    x_ptr,  # [rows, columns] with an activation, else None
    activated_ptr,  # [rows, columns] or None
    dx_ptr,  # [rows, columns]
    rows,
    tokens,
    columns,
    x_stride,
    ACTIVATION: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
):
    """`dx = layer_scale * product * activation'(x)`, and activated = activation(x): the end of `input_gradient_kernel`.

    With `kept_ptr`, rows are those of kept samples; all tensors are packed.
    """
    column_tiles = tl.cdiv(columns, COLUMN_BLOCK)
    first = tl.program_id(0) // column_tiles * ROW_BLOCK
    if kept_ptr is not None:
        rows = tl.minimum(rows, tl.load(kept_ptr) * tokens)
        if first >= rows:
            return
    row = first + tl.arange(0, ROW_BLOCK)
    column = tl.program_id(0) % column_tiles * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    product = tl.load(product_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if layer_scale_ptr is not None:
        product *= tl.load(layer_scale_ptr)
    if ACTIVATION != "none":
        x = tl.load(x_ptr + row.to(tl.int64)[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        short: tl.constexpr = dx_ptr.dtype.element_ty.primitive_bitwidth == 16
        activated, derivative = gelu_and_derivative(x.to(tl.float32), ACTIVATION, short)
        if activated_ptr is not None:
            tl.store(activated_ptr + offset, activated.to(activated_ptr.dtype.element_ty), mask=mask)
        product *= derivative
    tl.store(dx_ptr + offset, product.to(dx_ptr.dtype.element_ty), mask=mask)


def input_gradient(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    dx: Tensor,
    layer_scale: Tensor | None,
    x: Tensor | None,
    activation: str,
    activated: Tensor | None,
    tokens: int,
    kept: Tensor | None,
) -> None:
    """Fills dx [..., K], and `activated` where it is given, as `input_gradient_kernel` does.

    grads: [rows, N]; weights: [N, K]; x: [rows, K]. `tokens` rows make a sample. Sums of three
    projections are rounded on the way, as stock PyTorch's are.
    """
    columns = dx.shape[-1]
    rows = dx.numel() // columns
    is_all = layer_scale is None and x is None
    product = dx.view(rows, columns)
    if not is_all:
        product = torch.empty((rows, columns), dtype=weights[0].dtype, device=dx.device)
    for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
        multiply("input_gradient", grad, weight, product, product if i else None)
    if is_all:
        return
    tile = settings.EPILOGUE
    run.run(
        input_gradient_epilogue_kernel,
        triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),
        dx.device,
        product,
        layer_scale,
        kept,
        x,
        activated,
        dx,
        rows,
        tokens,
        columns,
        0 if x is None else x.stride(0),
        ACTIVATION=activation,
        ROW_BLOCK=tile.rows,
        COLUMN_BLOCK=tile.columns,
        num_warps=tile.num_warps,
    )


def weight_gradient(grads: Sequence[Tensor], x: Tensor, need_sum: bool) -> tuple[Tensor, Tensor | None]:
    """As `weight_gradient_partials` returns them, in one part; grads [rows, N], x [rows, K].

    In float32, so that a gradient of 16 bits is rounded once, by the launch after it.
    """
    out_features, in_features = grads[0].shape[1], x.shape[1]
    all_features = len(grads) * out_features
    product = torch.empty((1, all_features, in_features), dtype=torch.float32, device=x.device)
    for grad, of_one in zip(grads, product[0].split(out_features), strict=True):
        multiply("weight_gradient", grad.T, x, of_one)
    if not need_sum:
        return product, None
    sums = [column_sums(grad, torch.float32) for grad in grads]
    return product, (sums[0] if len(sums) == 1 else torch.cat(sums)).view(1, all_features)
