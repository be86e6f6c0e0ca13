"""What follows a product before it reaches memory: of `linear_kernel`'s own, and of the vendor's GEMM."""

import triton
import triton.language as tl

from deit_fast.kernels.device import add_residual, gelu


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
