"""Readout attention against float64, and no less accurate than stock PyTorch with keys of LN(x)."""

from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.readout import readout, unsupported
from reference.readout import readout as reference_readout
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard

EPS = 1e-6
TOKENS = (1, 2, 17, 64, 197, 198, 257)
WIDTHS = (50, 64, 192, 200, 384, 768)
# x, dots, norm weight: each dtype alone, and autocast's float32 stream and parameters beside 16-bit dots.
MIXTURES = [(dtype, dtype, dtype) for dtype in DTYPES]
MIXTURES += [(torch.float32, dtype, torch.float32) for dtype in (torch.float16, torch.bfloat16)]

in_every_mixture = pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "-".join(str(d)[6:] for d in m))


def stock(x: Tensor, absorbed: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In stock PyTorch's steps and roundings: LayerNorm, a product, softmax, a product."""
    y = F.layer_norm(x, x.shape[-1:], weight, None, eps).to(dtype)
    batch, rows, heads, width = absorbed.shape
    scores = absorbed.to(dtype).flatten(1, 2) @ y.mT
    normalised = F.layer_norm(x, x.shape[-1:], None, None, eps).to(dtype)
    summed = scores.float().softmax(-1).to(dtype) @ normalised
    log_sum_exp = scores.float().logsumexp(-1)
    return summed.view(batch, rows, heads, width).float(), log_sum_exp.view(batch, rows, heads)


def check(x: Tensor, absorbed: Tensor, weight: Tensor | None, dtype: torch.dtype, eps: float = EPS) -> Tensor:
    """Both results within stock's error, inside guard bands, the same bits twice."""
    guard = Guard()
    banded = [t if t is None else guard(t) for t in (x, absorbed, weight)]
    with guard.outputs():
        found, again = readout(*banded, eps, dtype), readout(*banded, eps, dtype)
    guard.assert_untouched()
    theirs = stock(x, absorbed, weight, eps, dtype)
    truth = reference_readout(x.double(), absorbed.double(), None if weight is None else weight.double(), eps)
    for name, mine, twice, other, best in zip(("summed", "lse"), found, again, theirs, truth, strict=True):
        assert_as_accurate_as_stock(mine, other, best, torch.float32, name=name)
        assert torch.equal(mine.view(torch.int32), twice.view(torch.int32)), f"{name} changes from run to run"
        assert not mine.numel() or guard.output_count
    return found[0]


def images(tokens: int, queries: tuple[int, int], mixture: tuple) -> int:
    """So many that the errors of the softmax's weights, most of a float32 result's, are a sample."""
    return max(2, (1024 if mixture[1] is torch.float32 else 128) // (tokens * prod(queries)))


def inputs(batch, tokens, width, queries, mixture):
    """x, absorbed, norm weight: scores of a few units, as attention has them."""
    stream, dots, parameter = mixture
    x = randn(batch, tokens, width, dtype=stream)
    absorbed = randn(batch, *queries, width, dtype=dots, scale=1.5 * width**-0.5)
    return x, absorbed, (1 + randn(width, dtype=torch.float32, scale=0.3)).to(parameter), dots


@in_every_mixture
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, mixture):
    check(*inputs(1, tokens, 64, (2, 3), mixture))


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, mixture):
    check(*inputs(2, 37, width, (1, 3), mixture))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1024, 1280])
def test_the_widest_models(width, dtype):
    check(*inputs(1, 19, width, (2, 16), (dtype,) * 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [(1, 1), (1, 16), (2, 12), (2, 17)])
def test_any_number_of_rows_and_heads(queries, dtype):
    check(*inputs(images(33, queries, (dtype,) * 3), 33, 64, queries, (dtype,) * 3))


@in_every_mixture
def test_no_norm_weight_and_a_16_bit_weight_of_float32_queries(mixture):
    x, absorbed, weight, dtype = inputs(4, 21, 96, (2, 3), mixture)
    check(x, absorbed, None, dtype)
    check(x, absorbed.float(), weight, dtype)


@in_every_mixture
def test_any_strides(mixture):
    x, absorbed, weight, dtype = inputs(3, 20, 50, (2, 3), mixture)
    check(strided(x), strided(absorbed), strided(weight), dtype)
    check(x.transpose(0, 1).contiguous().transpose(0, 1), absorbed.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
          weight, dtype)  # fmt: skip
    check(x[:1].expand_as(x), absorbed[:, :, :1].expand_as(absorbed), weight, dtype)
    # Every token alike: nothing to choose among.
    check(x[:, :1].expand_as(x), absorbed, weight, dtype)
    check(x[..., :1].expand_as(x), absorbed, weight, dtype)


@pytest.mark.parametrize(("batch", "queries"), [(0, (1, 3)), (2, (0, 3))])
def test_nothing_to_read_out(batch, queries):
    check(*inputs(batch, 9, 32, queries, (torch.float32,) * 3))


@in_every_mixture
def test_large_scores_do_not_overflow(mixture):
    x, absorbed, weight, dtype = inputs(4, 40, 64, (2, 3), mixture)
    check(x, absorbed * 40, weight, dtype)


@in_every_mixture
def test_a_large_mean_and_a_large_norm_weight_cost_no_digits(mixture):
    x, absorbed, weight, dtype = inputs(2, 40, 192, (1, 3), mixture)
    check((x.float() + 50).to(x.dtype), absorbed, weight, dtype)
    weight[7] = 20.0
    check(x, absorbed, weight, dtype)


def test_without_an_epsilon():
    check(*inputs(1, 19, 64, (1, 3), (torch.float32,) * 3), eps=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_in_a_token_reach_its_image_alone(value, dtype):
    x, absorbed, weight, _ = inputs(2, 40, 64, (2, 2), (dtype,) * 3)
    x[1, 37, 3] = value
    summed = check(x, absorbed, weight, dtype)
    assert summed[0].isfinite().all()
    assert summed[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_in_a_query_stays_in_its_head(dtype):
    x, absorbed, weight, _ = inputs(1, 40, 64, (2, 2), (dtype,) * 3)
    absorbed[0, 1, 0, 3] = torch.nan
    summed = check(x, absorbed, weight, dtype)
    assert torch.equal(summed.isnan().all(-1), torch.tensor([[[False, False], [True, False]]]))
    assert torch.equal(summed.isnan().any(-1), summed.isnan().all(-1))


def test_rows_that_do_not_fit_are_refused():
    assert unsupported(1280) is None
    assert unsupported(1280, torch.bfloat16) is None
    assert unsupported(192, torch.float32) is None
    assert "at most 1280" in unsupported(1281)
    assert "at most 256" in unsupported(384, torch.float32)
