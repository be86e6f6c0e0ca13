"""Gradients of readout attention against float64, and no less accurate than those of stock PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.readout import readout, readout_backward
from reference.readout import readout as reference_readout
from tests.kernels.readout.test_forward import EPS, TOKENS, WIDTHS, images, in_every_mixture, inputs
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard


def stock(x: Tensor, weighted: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """In stock PyTorch's steps and roundings; `weighted` stands for the norm's weight times the queries.

    What is read out is LN(x), which the norm's weight scales again.
    """
    y = F.layer_norm(x, x.shape[-1:], None, None, eps).to(dtype)
    batch, rows, heads, width = weighted.shape
    scores = weighted.to(dtype).flatten(1, 2) @ y.mT
    summed = scores.float().softmax(-1).to(dtype) @ y
    return summed.view(batch, rows, heads, width)


def exact(x: Tensor, weighted: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    return reference_readout(x, weighted, None, eps)[0]


def differentiate(function, x, absorbed, weight, dsummed, dtype, eps, kind) -> tuple[Tensor, Tensor]:
    """The gradients of x and of weight · absorbed, in `kind` or, where None, in the tensors' own dtypes."""
    x = (x if kind is None else x.to(kind)).detach().clone().requires_grad_()
    weighted = absorbed.to(kind or torch.float32)
    if weight is not None:
        weighted = weighted * weight.to(weighted.dtype)
    weighted = weighted.to(kind or dtype).detach().requires_grad_()
    summed = function(x, weighted, weight, eps, dtype)
    return torch.autograd.grad(summed, [x, weighted], dsummed.to(summed.dtype))


def check(x, absorbed, weight, dtype, dsummed=None, eps=EPS, recomputed=False) -> tuple[Tensor, Tensor]:
    """Both gradients within stock's error, inside guard bands, the same bits twice.

    `recomputed` allows for the weights' rounding as well. Stock keeps the forward's weights, and two of them add up to
    1 whatever the scores' rounding; ours come from scores that are summed in another order than the forward's.
    """
    if dsummed is None:
        dsummed = randn(*absorbed.shape, dtype=torch.float32)
    summed, log_sum_exp = readout(x, absorbed, weight, eps, dtype)
    guard = Guard()
    banded = [t if t is None else guard(t) for t in (x, absorbed, weight, summed, log_sum_exp, dsummed)]
    arguments = (*banded[:3], eps, *banded[3:], dtype)
    with guard.outputs():
        found, again = readout_backward(*arguments), readout_backward(*arguments)
    guard.assert_untouched()
    assert guard.output_count or not x.numel()
    theirs = differentiate(stock, x, absorbed, weight, dsummed, dtype, eps, None)
    truth = differentiate(exact, x, absorbed, weight, dsummed, dtype, eps, torch.float64)
    kinds = (x.dtype, torch.float32)
    for name, mine, twice, other, best, kind in zip(("dx", "dc"), found, again, theirs, truth, kinds, strict=True):
        assert torch.equal(bits(mine), bits(twice)), f"{name} changes from run to run"
        if recomputed:
            error, of_stock = (mine - best).norm(), (other - best).norm()
            of_weights = torch.finfo(torch.float32).eps * log_sum_exp.abs().max() * best.norm()
            assert error <= 2 * of_stock + of_weights, f"{name}: error {error}, stock's {of_stock}"
            assert (mine - best).abs().max() <= 4 * (other - best).abs().max(), name
        else:
            assert_as_accurate_as_stock(mine, other.to(kind), best, kind, name=name)
    return found


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@in_every_mixture
@pytest.mark.parametrize("tokens", [tokens for tokens in TOKENS if tokens > 1])
def test_any_number_of_tokens(tokens, mixture):
    few = tokens == 2 and mixture[1] is torch.float32
    check(*inputs(images(tokens, (2, 3), mixture), tokens, 64, (2, 3), mixture), recomputed=few)


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, mixture):
    check(*inputs(images(37, (1, 3), mixture), 37, width, (1, 3), mixture))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 1280])
def test_the_widest_models(width, dtype):
    check(*inputs(1, 19, width, (2, 16), (dtype,) * 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [(1, 1), (1, 16), (2, 12), (2, 17)])
def test_any_number_of_rows_and_heads(queries, dtype):
    check(*inputs(images(33, queries, (dtype,) * 3), 33, 64, queries, (dtype,) * 3))


@in_every_mixture
def test_one_token_gets_its_whole_gradient_through_its_sum(mixture):
    # Its weight is 1 whatever the query is: that of its score is dp − delta, two products that cancel but for their
    # rounding, and so is dc. Stock takes the same product twice.
    x, absorbed, weight, dtype = inputs(3, 1, 64, (1, 2), mixture)
    dsummed = randn(*absorbed.shape, dtype=torch.float32)
    summed, log_sum_exp = readout(x, absorbed, weight, EPS, dtype)
    dx, dc = readout_backward(x, absorbed, weight, EPS, summed, log_sum_exp, dsummed, dtype)
    of_scores = torch.finfo(dtype).eps * dsummed.double().norm()
    assert dc.double().norm() <= of_scores * summed.double().norm()
    best, _ = differentiate(exact, x, absorbed, weight, dsummed, dtype, EPS, torch.float64)
    other, _ = differentiate(stock, x, absorbed, weight, dsummed, dtype, EPS, None)
    rstd = x.double().var(-1, correction=0).rsqrt().max()
    noise = of_scores * (weight * absorbed).double().norm(dim=-1).max() * rstd
    # And the weight is recomputed, as good as its logarithm was stored.
    noise += torch.finfo(torch.float32).eps * log_sum_exp.abs().max() * best.norm()
    assert (dx.double() - best).norm() <= 2 * (other.double() - best).norm() + noise


@in_every_mixture
def test_no_norm_weight_and_queries_of_float32(mixture):
    x, absorbed, weight, dtype = inputs(4, 21, 96, (2, 3), mixture)
    check(x, absorbed, None, dtype)
    check(x, absorbed.float(), weight, dtype)


@in_every_mixture
def test_any_strides_and_a_gradient_of_any_dtype(mixture):
    x, absorbed, weight, dtype = inputs(3, 20, 50, (2, 3), mixture)
    dsummed = randn(*absorbed.shape, dtype=dtype)
    check(strided(x), strided(absorbed), strided(weight), dtype, strided(dsummed))

    def heads_first(t):
        return t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)

    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    check(tokens_first, heads_first(absorbed), weight, dtype, heads_first(dsummed))
    check(x[:1].expand_as(x), absorbed[:, :, :1].expand_as(absorbed), weight, dtype, dsummed[:1].expand_as(dsummed))


@pytest.mark.parametrize(("batch", "queries"), [(0, (1, 3)), (2, (0, 3))])
def test_nothing_read_out_gives_zeros(batch, queries):
    x, absorbed, weight, dtype = inputs(batch, 9, 32, queries, (torch.float32,) * 3)
    summed, log_sum_exp = readout(x, absorbed, weight, EPS, dtype)
    dx, dc = readout_backward(x, absorbed, weight, EPS, summed, log_sum_exp, summed, dtype)
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.equal(dc, torch.zeros_like(absorbed))


@in_every_mixture
def test_large_scores_do_not_overflow(mixture):
    x, absorbed, weight, dtype = inputs(4, 40, 64, (2, 3), mixture)
    check(x, absorbed * 4, weight, dtype)


@in_every_mixture
@pytest.mark.parametrize("scale", [1e-3, 1e-5])
def test_small_gradients_are_not_lost(scale, mixture):
    x, absorbed, weight, dtype = inputs(2, 70, 64, (2, 3), mixture)
    check(x, absorbed, weight, dtype, randn(*absorbed.shape, dtype=torch.float32, scale=scale))


@in_every_mixture
def test_a_large_mean_and_a_large_norm_weight_cost_no_digits(mixture):
    x, absorbed, weight, dtype = inputs(2, 40, 192, (1, 3), mixture)
    check((x.float() + 50).to(x.dtype), absorbed, weight, dtype)
    weight[7] = 20.0
    check(x, absorbed, weight, dtype)


def test_without_an_epsilon():
    check(*inputs(4, 19, 64, (2, 3), (torch.float32,) * 3), eps=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["x", "absorbed", "dsummed"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_reach_their_image_alone(which, value, dtype):
    x, absorbed, weight, _ = inputs(2, 40, 64, (2, 2), (dtype,) * 3)
    tensors = {"x": x, "absorbed": absorbed, "dsummed": randn(*absorbed.shape, dtype=torch.float32)}
    tensors[which][(1, 1) if which == "x" else (1, 1, 0)][3] = value
    dx, dc = check(x, absorbed, weight, dtype, tensors["dsummed"])
    assert dx[0].isfinite().all()
    assert dc[0].isfinite().all()
    assert dx[1].isnan().all()
