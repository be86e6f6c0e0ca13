import pytest
import torch
import triton
import triton.language as tl

from deit_fast.kernels.device import gelu, gelu_and_derivative


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, both_ptr, derivative_ptr, KIND: tl.constexpr, SHORT: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset).to(tl.float32)
    both, derivative = gelu_and_derivative(x, KIND, SHORT)
    tl.store(y_ptr + offset, gelu(x, KIND, SHORT).to(y_ptr.dtype.element_ty))
    tl.store(both_ptr + offset, both.to(both_ptr.dtype.element_ty))
    tl.store(derivative_ptr + offset, derivative.to(derivative_ptr.dtype.element_ty))


def _by_kernel(x, kind, short):
    y, both, derivative = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    _gelu_kernel[(x.numel() // 4096,)](x, y, both, derivative, KIND=kind, SHORT=short, BLOCK=4096)
    return y, both, derivative


def _every_number(dtype):
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


def _unit(exact, dtype):
    """A unit in the last place of `dtype` at `exact`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny))[1] - 1
    return info.eps * 2.0 ** exponent.double()


# The formula of torch, by erf in float32, is off by up to 7.6 units in bfloat16 and 2.7 in float16.
@pytest.mark.parametrize(("dtype", "units"), [(torch.bfloat16, 0.503), (torch.float16, 0.547)])
def test_short_gelu_is_right_for_every_number_of_16_bits(dtype, units):
    x = _every_number(dtype)
    y, both, _ = _by_kernel(x, "gelu", True)
    torch.testing.assert_close(both, y, rtol=0, atol=0, equal_nan=True)
    wide = x.double()
    exact = wide * torch.special.ndtr(wide)
    error = (y.double() - exact).abs()
    # Past float16's normal numbers, and where bfloat16's have no more to give beside numbers around 1.
    counted = x.isfinite() & (exact.abs() > (2**-24 if dtype is torch.float16 else 1e-6))
    assert (error / _unit(exact, dtype))[counted].max() < units
    assert error[x.isfinite() & ~counted].max() < 1e-6


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("short", [False, True])
def test_gelu_and_its_derivative_are_those_of_torch(kind, short):
    x = torch.linspace(-30, 30, 8192)
    y, both, derivative = _by_kernel(x, kind, short)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide, approximate="tanh" if kind == "gelu_tanh" else "none")
    exact.sum().backward()
    tolerance = 1.3e-5 if short and kind == "gelu" else 1e-6
    for found, wanted in ((y, exact), (both, exact), (derivative, wide.grad)):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("short", [False, True])
def test_gelu_of_nan_and_infinities_is_that_of_torch(kind, short):
    """In float64: of +inf, its float32 GELU is NaN on processors with AVX-512."""
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0] * 1024, dtype=torch.float64, requires_grad=True)
    exact = torch.nn.functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    exact.sum().backward()
    exact = exact.detach(), exact.detach(), x.grad
    for found, wanted in zip(_by_kernel(x.detach().float(), kind, short), exact, strict=True):
        torch.testing.assert_close(found, wanted.float(), equal_nan=True)
