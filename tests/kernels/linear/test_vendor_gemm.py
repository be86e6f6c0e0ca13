"""Without kept samples, what the vendor's GEMM computes is compared together with the kernels' (test_backward.py, and
tests/ops/test_linear.py).
"""

import pytest
import torch

from deit_fast.kernels import drop_path, linear
from deit_fast.kernels.linear import settings, vendor_gemm
from tests.support.compare import DTYPES, randn
from tests.support.guard import Guard

EPS = 1e-6
KEPT = [0, 2]


def packed(x):
    """Kept samples of [3, ...], with room for a third; NaN is in it, and must reach nothing."""
    room = torch.full_like(x[:1], torch.nan)
    return torch.cat([x[KEPT], room])


def compared(monkeypatch, call):
    """What the kernels return, and then the vendor's GEMM, twice the same."""
    guard = Guard()
    with guard.outputs():
        ours = call()
    with monkeypatch.context() as patched, guard.outputs():
        patched.setattr(settings, "vendor", lambda *_: True)
        vendor_gemm.used.clear()
        theirs, again = call(), call()
        assert vendor_gemm.used
    guard.assert_untouched()
    assert all(map(torch.equal, theirs, again))
    return zip(ours, theirs, strict=True)


def assert_close(mine, other):
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[mine.dtype]
    torch.testing.assert_close(mine, other, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_kept_samples_forward(with_residual, dtype, monkeypatch):
    x, weight, vector = randn(3, 17, 64, dtype=dtype), randn(64, 64, dtype=dtype, scale=0.1), randn(64, dtype=dtype)
    factors = torch.tensor([1.5, 0.0, 1.5], dtype=dtype)
    kept = drop_path.keep_samples(factors)

    def call():
        if with_residual:
            return (linear.linear_residual(packed(x), weight, vector, x, vector, factors, kept),)
        of_fc1 = linear.layer_norm_fc1(x, vector, vector, EPS, weight, vector, "gelu", kept)
        projections = [weight, -weight, weight.flip(0)], [vector, None, vector]
        return [y[:2] for y in (*of_fc1, *linear.layer_norm_linear(x, None, None, EPS, *projections, kept))]

    for mine, other in compared(monkeypatch, call):
        assert_close(other, mine)
        assert not with_residual or torch.equal(other[1], x[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_kept_samples_backward(activation, dtype, monkeypatch):
    """Nothing that lies in the room of a packed tensor reaches a weight's gradient."""
    x, weight, vector = randn(3, 17, 64, dtype=dtype), randn(64, 64, dtype=dtype, scale=0.1), randn(64, dtype=dtype)
    grad, factors = randn(3, 17, 64, dtype=dtype), torch.tensor([1.5, 0.0, 1.5], dtype=dtype)
    kept = drop_path.keep_samples(factors)

    def call():
        arguments = grad, packed(x), weight, vector, vector, factors, activation, kept, [True] * 4
        dx, *parameters = linear.linear_backward(*arguments)
        return [dx[:2], *parameters]

    for mine, other in compared(monkeypatch, call):
        assert_close(other, mine)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_samples_backward_of_a_layer_norm(dtype, monkeypatch):
    x, weight, vector = randn(3, 17, 64, dtype=dtype), randn(64, 64, dtype=dtype, scale=0.1), randn(64, dtype=dtype)
    grad, kept = packed(randn(3, 17, 64, dtype=dtype)), drop_path.keep_samples(torch.tensor([1.5, 0.0, 1.5]))

    def call():
        return linear.layer_norm_linear_backward(
            x, vector, vector, EPS, [grad], [weight], [vector], kept, x, [True] * 5
        )  # fmt: skip

    for mine, other in compared(monkeypatch, call):
        assert_close(other, mine)


def test_what_it_has_computed_can_be_told(monkeypatch):
    monkeypatch.setattr(settings, "vendor", lambda *_: True)
    vendor_gemm.used.clear()
    x, weight = torch.ones(2, 3, 8), torch.ones(16, 8)
    y = linear.linear(x, weight, None, "none")
    linear.linear_backward(y, x, weight, None, None, None, "none", None, [True, True, False, False])
    assert list(vendor_gemm.used) == ["linear 8×16", "input_gradient 16×8", "weight_gradient 16×8"]
