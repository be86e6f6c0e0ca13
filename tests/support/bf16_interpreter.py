"""Makes bfloat16 right in Triton's interpreter.

The interpreter keeps a bfloat16 as its 16 bits in a uint16 array and then computes on the bits; its float32
to bfloat16 cast does not round to nearest even. Here every operation widens to float32 and rounds on the way
back, as the hardware does. What only moves bits (load, store, select, reshape, broadcast) is right already.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray, toward_zero: bool = False) -> np.ndarray:
    """Numbers to bfloat16 bits (uint16), by way of float32 as torch does; to nearest even, NaN stays NaN."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    rounded = bits if toward_zero else bits + 0x7FFF + ((bits >> 16) & 1)
    return np.where(is_nan, (bits >> 16) | 0x40, rounded >> 16).astype(np.uint16)


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrowed(data: np.ndarray) -> TensorHandle:
    return TensorHandle(data, tl.int1) if data.dtype == np.bool_ else TensorHandle(narrow(data), tl.bfloat16)


def _get_bf16(self, value):
    return TensorHandle(narrow(np.array([value])), tl.bfloat16)


def _cast_impl(self, src, dst_type, stock=InterpreterBuilder.cast_impl):
    src = _widened(src)
    if dst_type.scalar == tl.bfloat16:
        return TensorHandle(narrow(src.data), tl.bfloat16)
    return stock(self, src, dst_type)


def _fp_to_fp(self, src, dst_type, rounding_mode, stock=InterpreterBuilder.create_fp_to_fp):
    if dst_type.scalar == tl.bfloat16 and src.dtype.scalar in (tl.float32, tl.float64):
        toward_zero = rounding_mode == ir.ROUNDING_MODE.RTZ
        return TensorHandle(narrow(src.data, toward_zero), tl.bfloat16)
    return stock(self, src, dst_type, rounding_mode)


def _binary_op(self, lhs, rhs, op, stock=InterpreterBuilder.binary_op):
    if not _is_bf16(lhs):
        return stock(self, lhs, rhs, op)
    return _narrowed(op(widen(lhs.data), widen(rhs.data)))


def _unary_op(self, arg, op, stock=InterpreterBuilder.unary_op):
    return _narrowed(op(widen(arg.data))) if _is_bf16(arg) else stock(self, arg, op)


def _fma(self, x, y, z, stock=InterpreterBuilder.create_fma):
    return _narrowed(widen(x.data) * widen(y.data) + widen(z.data)) if _is_bf16(z) else stock(self, x, y, z)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc, stock=InterpreterBuilder.create_dot):
    return stock(self, _widened(a), _widened(b), d, input_precision, max_num_imprecise_acc)


def _sum(self, input, stock=ReduceOps.sum):
    """Halves the axis again and again, rounding each step: a sum in bfloat16 is as poor as on a GPU."""
    if not _is_bf16(input.handle):
        return stock(self, input)
    data = widen(input.handle.data)
    data = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
    while len(data) > 1:
        data = widen(narrow(data[: len(data) // 2] + data[len(data) // 2 :]))
    total = narrow(data[0])
    if self.keep_dims:
        total = np.expand_dims(total, tuple(range(len(input.shape))) if self.axis is None else self.axis)
    return self.to_tensor(total, input.dtype)


def _cumulative(stock):
    # The generic scan combines element by element through binary_op, which rounds.
    return lambda self, input: self.generic_scan((input,)) if _is_bf16(input.handle) else stock(self, input)


def install() -> None:
    """Patches the interpreter of this process; a second call changes nothing."""
    if InterpreterBuilder.cast_impl is _cast_impl:
        return
    InterpreterBuilder.get_bf16 = _get_bf16
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fp_to_fp = _fp_to_fp
    InterpreterBuilder.binary_op = _binary_op
    InterpreterBuilder.unary_op = _unary_op
    InterpreterBuilder.create_fma = _fma
    InterpreterBuilder.create_dot = _dot
    ReduceOps.sum = _sum
    ScanOps.cumsum = _cumulative(ScanOps.cumsum)
    ScanOps.cumprod = _cumulative(ScanOps.cumprod)
