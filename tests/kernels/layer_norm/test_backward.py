import pytest
import torch
import torch.nn.functional as F

from deit_fast.kernels.layer_norm import backward as kernels
from deit_fast.kernels.layer_norm.settings import COLUMN_SUMS
from reference.layer_norm import layer_norm
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard

EPS = 1e-6
ROWS = (1, 2, 17, 65, 197, 578)
WIDTHS = (64, 192, 384, 768, 50, 100)
# x, parameters, gradient: each dtype alone, and the float32 stream that autocast leaves beside 16-bit gradients.
MIXTURES = [(dtype, dtype, dtype) for dtype in DTYPES]
MIXTURES += [(torch.float32, torch.float32, dtype) for dtype in (torch.float16, torch.bfloat16)]

in_every_mixture = pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "-".join(str(d)[6:] for d in m))


def stock(x, weight, bias, residual_grad):
    """`residual_grad` goes past the norm: its gradient reaches x through a sum."""
    y = F.layer_norm(x, (x.shape[-1],), weight, bias, EPS)
    return y if residual_grad is None else (y, x * 1)


def exact(x, weight, bias, residual_grad):
    y = layer_norm(x, weight, bias, EPS)
    return y if residual_grad is None else (y, x * 1)


def gradients(function, x, weight, bias, grad, residual_grad, double):
    leaves = [t if t is None else (t.double() if double else t).detach().clone() for t in (x, weight, bias)]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    y = function(*leaves, residual_grad)
    outputs = y if isinstance(y, tuple) else (y,)
    given = [g for g in (grad, residual_grad) if g is not None]
    found = iter(torch.autograd.grad(outputs, wanted, [g.to(o.dtype) for g, o in zip(given, outputs, strict=True)]))
    return [t if t is None else next(found) for t in leaves]


def ours(x, weight, grad, residual_grad):
    dx, mean, rstd = kernels.layer_norm_gradient_and_statistics(grad, x, weight, EPS, residual_grad)
    dtype = x.dtype if weight is None else weight.dtype
    return dx, *kernels.layer_norm_parameter_gradients(grad, x, mean, rstd, dtype)


def check(x, weight, bias, grad, residual_grad=None):
    """All gradients within stock's error, inside guard bands, the same bits twice; absent parameters skipped."""
    guard = Guard()
    banded = [t if t is None else guard(t) for t in (x, weight, grad, residual_grad)]
    with guard.outputs():
        found, again = ours(*banded), ours(*banded)
    guard.assert_untouched()
    assert guard.output_count or not x.numel()
    theirs = gradients(stock, x, weight, bias, grad, residual_grad, double=False)
    truth = gradients(exact, x, weight, bias, grad, residual_grad, double=True)
    for name, mine, twice, other, best in zip(("dx", "dweight", "dbias"), found, again, theirs, truth, strict=True):
        assert torch.equal(mine, twice), f"{name} changes from run to run"
        if other is not None:
            assert_as_accurate_as_stock(mine, other, best, other.dtype, name=name)


def inputs(rows, width, mixture):
    stream, parameter, gradient = mixture
    x, residual_grad = randn(rows, width, dtype=stream), randn(rows, width, dtype=stream)
    weight, bias = randn(width, dtype=parameter), randn(width, dtype=parameter)
    return x, weight, bias, randn(rows, width, dtype=gradient), residual_grad


@in_every_mixture
@pytest.mark.parametrize("rows", ROWS)
def test_any_number_of_rows(rows, mixture):
    check(*inputs(rows, 64, mixture))


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, mixture):
    check(*inputs(9, width, mixture))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_parameters_or_a_residual(dtype):
    x, weight, _, grad, residual_grad = inputs(5, 96, (dtype,) * 3)
    check(x, None, None, grad)
    check(x, weight, None, grad)
    check(x, None, None, grad, residual_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    x, weight, bias, grad, residual_grad = inputs(6, 50, (dtype,) * 3)
    check(strided(x), strided(weight), bias, strided(grad), strided(residual_grad))
    check(x, weight, bias, grad[:1].expand(6, 50), residual_grad[:, :1].expand(6, 50))
    x = x.view(2, 3, 50)
    check(x.transpose(0, 1), weight, bias, grad.view(3, 2, 50), residual_grad.view(2, 3, 50).transpose(0, 1))


def test_no_rows():
    x, weight, bias, grad, residual_grad = inputs(0, 32, (torch.float32,) * 3)
    check(x, weight, bias, grad, residual_grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(dtype):
    x, weight, bias, grad, _ = inputs(12, 192, (dtype,) * 3)
    check((x.float() + 100).to(dtype), weight, bias, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_are_those_of_the_backward(dtype):
    x, weight, _, grad, _ = inputs(7, 192, (dtype,) * 3)
    mean, rstd = kernels.row_statistics(x, EPS)
    _, same_mean, same_rstd = kernels.layer_norm_gradient_and_statistics(grad, x, weight, EPS)
    assert torch.equal(mean, same_mean)
    assert torch.equal(rstd, same_rstd)
    centred = x.double() - x.double().mean(1, keepdim=True)
    # However the halves of a row are added up, in 8 levels, each level rounds by up to half a unit.
    of_mean = 4 * torch.finfo(torch.float32).eps * x.abs().max().item()
    torch.testing.assert_close(mean.double(), x.double().mean(1), rtol=0, atol=of_mean)
    torch.testing.assert_close(rstd.double(), (centred.square().mean(1) + EPS).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", (1, 65, COLUMN_SUMS.depth))
def test_column_sums_scale_columns(tokens, dtype):
    grad, scale = randn(3, tokens, 100, dtype=dtype), randn(100, dtype=dtype)
    found = kernels.column_sums(grad, dtype, scale=scale)
    exact = grad.double() * scale.double()
    assert_as_accurate_as_stock(found, (grad * scale).sum((0, 1)), exact.sum((0, 1)), dtype)


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_normalised_rows_come_with_the_backward_and_alone(width, mixture):
    x, weight, _, grad, residual_grad = inputs(9, width, mixture)
    guard = Guard()
    given = [guard(t) for t in (grad, x, weight)]
    with guard.outputs():
        dx, normalised = kernels.layer_norm_input_gradient(
            *given, EPS, residual_grad=guard(residual_grad), normalised_dtype=grad.dtype
        )
        alone = kernels.normalised_rows(given[1], EPS, grad.dtype)
    guard.assert_untouched()
    assert torch.equal(normalised, alone)
    stock = F.layer_norm(x, (width,), eps=EPS).to(grad.dtype)
    assert_as_accurate_as_stock(normalised, stock, layer_norm(x.double(), None, None, EPS), grad.dtype)
    assert torch.equal(dx, kernels.layer_norm_input_gradient(grad, x, weight, EPS, residual_grad=residual_grad)[0])
