"""bfloat16 in the interpreter agrees with torch's, bit for bit where the order of operations is the same."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.support.bf16_interpreter import narrow, widen

BF16 = torch.bfloat16
# Ties to even and odd, one bit either side of a tie, subnormals of both formats, overflow, and specials.
HARD_BITS = [
    0x3F800000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3F817FFF, 0x3F818001, 0xBF808000,
    0xBF818000, 0x00000000, 0x80000000, 0x00000001, 0x00008000, 0x00008001, 0x00018000, 0x807FFFFF,
    0x00800000, 0x007F8000, 0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7FFFFF, 0xFF7F8000, 0x7F800000,
    0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x42F6E979, 0xC2F6E979, 0x33D6BF95, 0x7149F2CA,
]  # fmt: skip


def hard_floats() -> torch.Tensor:
    values = torch.tensor(HARD_BITS, dtype=torch.int64).to(torch.int32).view(torch.float32)
    return torch.cat([values, torch.randn(1024 - len(values)) * 10.0 ** torch.randint(-30, 30, (1024 - len(values),))])


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    finite = ~expected.isnan()
    assert torch.equal(torch.signbit(ours[finite]), torch.signbit(expected[finite]))


@triton.jit
def copy_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(y_ptr.dtype.element_ty))


@triton.jit
def masked_copy_kernel(x_ptr, y_ptr, n, other, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n, other=other))


@triton.jit
def truncate_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def binary_kernel(a_ptr, b_ptr, c_ptr, OP: tl.constexpr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    if OP == "add":
        c = a + b
    elif OP == "sub":
        c = a - b
    elif OP == "mul":
        c = a * b
    elif OP == "div":
        c = a / b
    elif OP == "max":
        c = tl.maximum(a, b)
    elif OP == "where":
        c = tl.where((a < b) & (a != 0.5), a, b)
    elif OP == "fma":
        c = tl.fma(a, b, a)
    elif OP == "scalar":
        c = a * 1.5 + 0.3
    elif OP == "neg":
        c = -a
    tl.store(c_ptr + offsets, c.to(tl.bfloat16))


@triton.jit
def compare_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    a = tl.load(a_ptr + offsets)
    b = tl.load(b_ptr + offsets)
    count = (a < b).to(tl.int32) + 2 * (a <= b).to(tl.int32) + 4 * (a == b).to(tl.int32) + 8 * (a > b).to(tl.int32)
    tl.store(c_ptr + offsets, count)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def reduce_kernel(x_ptr, y_ptr, OP: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    x = tl.load(x_ptr + m[:, None] * N + tl.arange(0, N)[None, :])
    if OP == "sum":
        y = tl.sum(x, 1)
    elif OP == "sum_keep_dims":
        y = tl.sum(x, 1, keep_dims=True).reshape(M)
    elif OP == "sum_fp32":
        y = tl.sum(x, 1, dtype=tl.float32)
    elif OP == "max":
        y = tl.max(x, 1)
    elif OP == "min":
        y = tl.min(x, 1)
    elif OP == "exp":
        y = tl.sum(tl.exp(x.to(tl.float32)), 1)
    tl.store(y_ptr + m, y.to(y_ptr.dtype.element_ty))


@triton.jit
def add_combine(a, b):
    return a + b


@triton.jit
def scan_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offsets = tl.arange(0, N)
    tl.store(y_ptr + offsets, tl.associative_scan(tl.load(x_ptr + offsets), 0, add_combine))


def test_narrow_rounds_every_hard_case_as_torch_does():
    x = hard_floats()
    ours = torch.from_numpy(narrow(x.numpy()).view(np.int16)).view(BF16)
    assert_same(ours, x.to(BF16))


def test_widen_then_narrow_is_the_identity_on_all_bit_patterns_but_signalling_nan():
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    back = narrow(widen(bits))
    is_nan = (bits & 0x7FFF) > 0x7F80
    assert np.array_equal(back[~is_nan], bits[~is_nan])
    assert np.array_equal(back[is_nan], bits[is_nan] | 0x40)


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.float64, torch.int32, torch.uint8])
def test_casts_to_bfloat16_round_to_nearest_even(source):
    x = hard_floats() if source.is_floating_point else torch.randint(0, 2**8, (1024,)) * 65_537
    x = x.to(source)
    y = torch.empty(1024, dtype=BF16)
    copy_kernel[(1,)](x, y, 1024)
    assert_same(y, x.to(BF16))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.float64, torch.int32])
def test_casts_from_bfloat16(target):
    x = hard_floats().to(BF16) if target.is_floating_point else torch.randn(1024).mul(1000).to(BF16)
    y = torch.empty(1024, dtype=target)
    copy_kernel[(1,)](x, y, 1024)
    assert_same(y, x.to(target))


def test_cast_toward_zero_truncates():
    x = torch.tensor([1.0, 1.9999, -1.9999, 3.0e-39, float("inf"), -float("inf"), float("nan"), 0.1] * 2)
    y = torch.empty(16, dtype=BF16)
    truncate_kernel[(1,)](x, y, 16)
    expected = (x.view(torch.int32) & -65536).view(torch.float32).to(BF16)
    assert_same(y, expected)


@pytest.mark.parametrize("other", [0.0, 1.0, -3.14159, float("-inf"), float("nan")])
def test_masked_load_fills_with_the_other_value(other):
    x, y = torch.randn(64).to(BF16), torch.empty(64, dtype=BF16)
    masked_copy_kernel[(1,)](x, y, 50, other, 64)
    assert_same(y, torch.where(torch.arange(64) < 50, x, torch.tensor(other).to(BF16)))


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div", "max", "where", "fma", "scalar", "neg"])
def test_arithmetic(op):
    a, b = hard_floats().to(BF16), hard_floats().flip(0).to(BF16)
    c = torch.empty_like(a)
    binary_kernel[(1,)](a, b, c, op, 1024)
    expected = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "div": lambda: a / b,
        "max": lambda: torch.fmax(a, b),
        "where": lambda: torch.where((a < b) & (a != 0.5), a, b),
        "fma": lambda: (a.float() * b.float() + a.float()).to(BF16),
        "scalar": lambda: a * torch.tensor(1.5, dtype=BF16) + torch.tensor(0.3, dtype=BF16),
        "neg": lambda: 0 - a,
    }[op]()
    if op in ("max", "neg"):  # the sign of a zero is nobody's promise here
        c, expected = c + 0.0, expected + 0.0
    assert_same(c, expected)


def test_comparisons():
    a, b = hard_floats().to(BF16), hard_floats().flip(0).to(BF16)
    a[::3] = b[::3]
    c = torch.empty(1024, dtype=torch.int32)
    compare_kernel[(1,)](a, b, c, 1024)
    expected = (a < b).int() + 2 * (a <= b).int() + 4 * (a == b).int() + 8 * (a > b).int()
    assert torch.equal(c, expected)


def test_dot_multiplies_the_values_and_accumulates_in_float32():
    a, b = torch.randn(32, 64).to(BF16), torch.randn(64, 16).to(BF16)
    c = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, c, 32, 16, 64)
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("op", ["max", "min"])
def test_extrema_are_exact_and_skip_nan(op):
    x = torch.randn(8, 64).to(BF16)
    x[2, 5] = float("nan")
    x[3, 7] = float("inf")
    y = torch.empty(8, dtype=BF16)
    reduce_kernel[(1,)](x, y, op, 8, 64)
    filled = x.nan_to_num(nan=float("-inf" if op == "max" else "inf"), posinf=float("inf"))
    assert_same(y, getattr(filled, f"a{op}")(1))


@pytest.mark.parametrize("op", ["sum", "sum_keep_dims"])
def test_sum_in_bfloat16_rounds_at_every_step(op):
    # 256 + 1 is 256 in bfloat16: exact 320, but pairs of equal ones add up before they meet the 256.
    x = torch.ones(4, 64).to(BF16)
    x[:, 0] = 256
    y = torch.empty(4, dtype=BF16)
    reduce_kernel[(1,)](x, y, op, 4, 64)
    level = x
    while level.shape[1] > 1:
        half = level.shape[1] // 2
        level = level[:, :half] + level[:, half:]
    assert_same(y, level[:, 0])
    assert (y.float() - 319).abs().max() <= 8


def test_sum_in_float32_of_bfloat16_values():
    x, y = torch.randn(8, 128).to(BF16), torch.empty(8)
    reduce_kernel[(1,)](x, y, "sum_fp32", 8, 128)
    torch.testing.assert_close(y, x.float().sum(1), rtol=1e-5, atol=1e-5)


def test_widened_exp():
    x, y = torch.randn(8, 32).to(BF16), torch.empty(8)
    reduce_kernel[(1,)](x, y, "exp", 8, 32)
    torch.testing.assert_close(y, x.float().exp().sum(1))


def test_scan_rounds_at_every_step():
    x, y = torch.randn(64).to(BF16), torch.empty(64, dtype=BF16)
    scan_kernel[(1,)](x, y, 64)
    running, expected = x[0], [x[0]]
    for value in x[1:]:
        running = running + value
        expected.append(running)
    assert_same(y, torch.stack(expected))


def test_float32_and_float16_are_left_as_they_were():
    for dtype in (torch.float32, torch.float16):
        a, b = torch.randn(256).to(dtype), torch.randn(256).to(dtype)
        y = torch.empty_like(a)
        copy_kernel[(1,)](a * b, y, 256)
        assert torch.equal(y, a * b)
