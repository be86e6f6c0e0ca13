import pytest
import torch

from deit_fast import ops
from deit_fast.ops import backend
from tests.support.compare import BATCHES, DTYPES, TOKENS, WIDTHS, assert_op_is_right, randn, strided

EPS = 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype):
    x = randn(1, tokens, 64, dtype=dtype)
    assert_op_is_right("layer_norm", x, randn(64, dtype=dtype), randn(64, dtype=dtype), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, dtype):
    x = randn(2, 9, width, dtype=dtype)
    weight, bias = randn(width, dtype=dtype), randn(width, dtype=dtype)
    assert_op_is_right("layer_norm", x, weight, bias, EPS)
    assert_op_is_right("add_layer_norm", x, randn(2, 9, width, dtype=dtype), weight, bias, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch(batch, dtype):
    x = randn(batch, 5, 192, dtype=dtype)
    assert_op_is_right("layer_norm", x, randn(192, dtype=dtype), None, EPS)
    assert_op_is_right("add_layer_norm", x, x, None, randn(192, dtype=dtype), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    weight = strided(randn(100, dtype=dtype))
    x = randn(3, 7, 100, dtype=dtype)
    for view in (strided(x), x[:1].expand(3, 7, 100), x.transpose(0, 1), x[:, 1:], x[:, :, :1].expand(3, 7, 100)):
        assert_op_is_right("layer_norm", view, weight, weight, EPS)
        assert_op_is_right("add_layer_norm", view, view, weight, weight, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(dtype):
    x = (randn(1, 8, 384, dtype=torch.float32) + 300).to(dtype)
    assert_op_is_right("layer_norm", x, None, None, EPS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_spoil_their_own_rows_only(dtype):
    x = randn(1, 6, 80, dtype=dtype)
    x[0, 1, 3], x[0, 2, 5], x[0, 4, 7] = torch.nan, torch.inf, -torch.inf
    y = assert_op_is_right("layer_norm", x, randn(80, dtype=dtype), randn(80, dtype=dtype), EPS)[0]
    assert y.isnan().any(dim=-1).tolist() == [[False, True, True, False, True, False]]


def test_the_sum_is_promoted_and_normalised_as_rounded():
    x, residual = randn(2, 3, 64, dtype=torch.bfloat16), randn(2, 3, 64, dtype=torch.float32)
    total, y = assert_op_is_right("add_layer_norm", x, residual, None, None, EPS)
    assert total.dtype == y.dtype == torch.float32


def test_rows_too_wide_for_the_chip_use_the_stock_operator_and_say_so():
    x = torch.randn(2, 10_000)
    with backend.forced("triton"), pytest.warns(UserWarning, match="layer_norm: rows of 10000 do not fit"):
        y = ops.layer_norm(x, None, None, EPS)
    assert torch.equal(y, torch.nn.functional.layer_norm(x, (10_000,), eps=EPS))


def test_autocast_gives_float32_as_the_stock_operator_does():
    x = randn(2, 3, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.layer_norm(x, None, None, EPS).dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 8), torch.ones(7), None, EPS), r"weight must have shape \(8,\), got \(7,\)"),
        ((torch.ones(2, 8), None, torch.ones(2, 8), EPS), r"bias must have shape \(8,\), got \(2, 8\)"),
        ((torch.tensor(1.0), None, None, EPS), "at least one dimension"),
        ((torch.ones(2, 8), torch.ones(8, device="meta"), None, EPS), "weight is on meta, the input on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(*arguments)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        ops.layer_norm(torch.ones(2, 8, dtype=torch.int64), None, None, EPS)


def test_a_residual_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 8\) and \(1, 8\)"):
        ops.add_layer_norm(torch.ones(2, 8), torch.ones(1, 8), None, None, EPS)
