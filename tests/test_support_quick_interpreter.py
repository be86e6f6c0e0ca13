"""Patching the language once a launch changes nothing but the time."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def square(x):
    return x * x


@triton.jit
def norm_kernel(x_ptr, y_ptr, FAIL: tl.constexpr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    if FAIL:
        x = x + tl.arange(0, 2 * N)
    tl.store(y_ptr, tl.sqrt(tl.sum(square(x), 0)))


def norm(x: torch.Tensor, fail: bool = False) -> torch.Tensor:
    y = torch.empty(())
    norm_kernel[(1,)](x, y, fail, x.numel())
    return y


def test_device_functions_work_in_one_launch_after_another():
    x = torch.randn(64)
    for _ in range(3):
        torch.testing.assert_close(norm(x), x.norm())


def test_the_language_is_put_back_after_a_launch_and_after_a_failed_one():
    stock = tl.arange, tl.core.arange, tl.math.sqrt, tl.tensor.__add__
    norm(torch.randn(64))
    assert (tl.arange, tl.core.arange, tl.math.sqrt, tl.tensor.__add__) == stock
    with pytest.raises(InterpreterError):
        norm(torch.randn(64), fail=True)
    assert (tl.arange, tl.core.arange, tl.math.sqrt, tl.tensor.__add__) == stock
    norm(torch.randn(64))
