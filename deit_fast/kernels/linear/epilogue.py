"""What follows a product before it reaches memory: of ours, and of the vendor's GEMM."""

import triton
import triton.language as tl

from deit_fast.kernels.device import add_residual, gelu, halves


@triton.jit
def epilogue(
    product, row, column, row_mask, column_mask, bias_ptr, residual_ptr, layer_scale_ptr, drop_path_scale_ptr,
    y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`y = residual + drop_path_scale * layer_scale * activation(product + bias)`, less what is absent.

    For a float32 tile of the `out_features` columns. With `activated_ptr`, y is what goes into the activation, and what
    comes out of y as it was rounded is `activated`.
    """
    mask = row_mask[:, None] & column_mask[None, :]
    offset = row.to(tl.int64)[:, None] * out_features + column[None, :]
    if bias_ptr is not None:
        product += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if activated_ptr is not None:
        rounded = product.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, rounded, mask=mask)
        product = rounded.to(tl.float32)
        y_ptr = activated_ptr
    if ACTIVATION != "none":
        product = gelu(product, ACTIVATION, y_ptr.dtype.element_ty.primitive_bitwidth == 16)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row.to(tl.int64)[:, None] * residual_stride + column[None, :]
        product = add_residual(
            product, residual_ptrs, layer_scale_ptr, drop_path_scale_ptr, row, column, row_mask, column_mask, tokens
        )
    tl.store(y_ptr + offset, product.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def epilogue_by_quarters(
    product, row, first_column, row_mask, bias_ptr, residual_ptr, layer_scale_ptr, drop_path_scale_ptr,
    y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """`epilogue` of a quarter of the tile's columns at a time, which takes fewer registers."""
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    left, right = halves(product, ROWS, COLUMNS)
    first_quarter, second_quarter = halves(left, ROWS, COLUMNS // 2)
    third_quarter, last_quarter = halves(right, ROWS, COLUMNS // 2)
    quarters = (first_quarter, second_quarter, third_quarter, last_quarter)
    for i in tl.static_range(4):
        column = first_column + i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        epilogue(
            quarters[i], row, column, row_mask, column < out_features, bias_ptr, residual_ptr, layer_scale_ptr,
            drop_path_scale_ptr, y_ptr, activated_ptr, tokens, out_features, residual_stride, ACTIVATION,
        )  # fmt: skip
