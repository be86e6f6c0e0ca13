import pytest
import torch

import reference
from deit_fast import ops
from deit_fast.kernels.linear import settings
from deit_fast.ops.linear import linear_backward
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import BATCHES, DTYPES, TOKENS, WIDTHS, assert_op_is_right, randn, strided

EPS = 1e-6


@pytest.fixture(params=["kernels", "the vendor's GEMM"])
def either_product(request, monkeypatch):
    """As shipped, and as `deit-fast tune` may choose."""
    if request.param != "kernels":
        monkeypatch.setattr(settings, "vendor", lambda *_: True)


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype):
    x, weight, bias = randn(1, tokens, 64, dtype=dtype), weight_of(64, 64, dtype), randn(64, dtype=dtype)
    norm = randn(64, dtype=dtype)
    assert_op_is_right("layer_norm_linear", x, norm, norm, EPS, weight, bias)
    assert_op_is_right("linear_residual", x, weight, bias, x, norm, randn(1, dtype=dtype))


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, dtype):
    x, norm = randn(2, 9, width, dtype=dtype), randn(width, dtype=dtype)
    into = weight_of(100, width, dtype)
    for bias in (None, randn(100, dtype=dtype)):
        assert_op_is_right("layer_norm_linear", x, norm, norm, EPS, into, bias)
    assert_op_is_right("linear", x, into, None, "none")
    narrow, bias = into[:64], randn(64, dtype=dtype)
    assert_op_is_right("layer_norm_qkv", x, norm, norm, EPS, narrow, bias, narrow.flip(0), None, -narrow, bias)
    back = weight_of(width, 100, dtype)
    for scales in ((None, None), (norm, randn(2, dtype=dtype))):
        assert_op_is_right("linear_residual", randn(2, 9, 100, dtype=dtype), back, norm, x, *scales)


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch(batch, dtype):
    x, weight, vector = randn(batch, 5, 96, dtype=dtype), weight_of(96, 96, dtype), randn(96, dtype=dtype)
    assert_op_is_right("linear", x, weight, vector)
    assert_op_is_right("layer_norm_linear", x, vector, vector, EPS, weight, vector)
    assert_op_is_right("layer_norm_qkv", x, vector, vector, EPS, weight, vector, weight, vector, weight, vector)
    scale = randn(batch, dtype=dtype)
    assert_op_is_right("linear_residual", x, weight, vector, x, vector, scale)


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
def test_every_activation(activation, dtype):
    x = randn(2, 20, 64, dtype=dtype, scale=2.0)
    with torch.no_grad():  # with gradients the stock operator is what computes this GELU
        assert_op_is_right("linear", x, weight_of(48, 64, dtype), randn(48, dtype=dtype), activation)
    assert_op_is_right("layer_norm_linear", x, None, None, EPS, weight_of(48, 64, dtype), None, activation)


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_layer_scale", [False, True])
@pytest.mark.parametrize("with_drop_path", [False, True])
def test_every_residual_epilogue(with_bias, with_layer_scale, with_drop_path, batch, dtype):
    x, weight, residual = randn(batch, 5, 64, dtype=dtype), weight_of(80, 64, dtype), randn(batch, 5, 80, dtype=dtype)
    bias = randn(80, dtype=dtype) if with_bias else None
    layer_scale = randn(80, dtype=dtype) if with_layer_scale else None
    drop_path_scale = torch.tensor([0.0, 1.25, 1.25], dtype=dtype)[:batch] if with_drop_path else None
    arguments = (x, weight, bias, residual, layer_scale, drop_path_scale)
    y = assert_op_is_right("linear_residual", *arguments)[0]
    if with_drop_path and batch:
        assert torch.equal(y[0], residual[0]), "a dropped sample passes its residual through"


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    # 20 rows where all are not different: with one column for all as well, an error norm is one of 20 roundings, and
    # of 3 it says nothing.
    x, weight, vector = randn(20, 20, 50, dtype=dtype), weight_of(50, 50, dtype), strided(randn(50, dtype=dtype))
    for view in (
        strided(x),
        x[:1].expand(20, 20, 50),
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x[:, :1].expand(20, 20, 50),
    ):
        for matrix in (strided(weight), weight.T, weight[:1].expand(50, 50)):
            assert_op_is_right("linear_residual", view, matrix, vector, strided(x), vector, None)
            assert_op_is_right("layer_norm_linear", view, vector, vector, EPS, matrix, vector)
    assert_op_is_right("layer_norm_qkv", x, vector, None, EPS, weight, None, strided(weight), None, weight.T, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_stock_form_s_gradients_keep_a_small_layer_scale(dtype):
    """In float16 layer_scale W falls below its range, where stock's layer_scale * grad does not."""
    x, weight, bias = randn(2, 20, 64, dtype=dtype), weight_of(48, 64, dtype), randn(48, dtype=dtype)
    layer_scale, grad = randn(48, dtype=dtype, scale=1e-5), randn(2, 20, 48, dtype=dtype, scale=1e3)
    found = linear_backward.stock(grad, x, weight, bias, layer_scale, None, "none", None, [True, True, True, True])

    def by_autograd(dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias, layer_scale)]
        branch = leaves[3] * torch.nn.functional.linear(*leaves[:3])
        return torch.autograd.grad(branch, leaves, grad.to(dtype))

    for ours, stock, exact in zip(found, by_autograd(dtype), by_autograd(torch.float64), strict=True):
        assert_as_accurate_as_stock(ours, stock, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_mean_costs_no_digits(dtype):
    x = (randn(1, 20, 200, dtype=torch.float32) + 100).to(dtype)
    assert_op_is_right("layer_norm_linear", x, None, None, EPS, weight_of(32, 200, dtype), None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [72, 200])
def test_rows_of_one_value_are_the_bias(width, dtype):
    """100 standard deviations of `sqrt(eps)`, which is all they have, are past float16's largest: in no padding."""
    x, bias = torch.full((1, 17, width), 100.0, dtype=dtype), randn(32, dtype=dtype)
    y = assert_op_is_right("layer_norm_linear", x, None, None, EPS, weight_of(32, width, dtype), bias)[0]
    assert torch.equal(y[0], bias.expand(17, 32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_where_float64_has_them(dtype):
    x, weight, bias = randn(1, 6, 40, dtype=dtype), weight_of(24, 40, dtype), randn(24, dtype=dtype)
    x[0, 1, 3], x[0, 2, 5], x[0, 4, 7] = torch.nan, torch.inf, -torch.inf
    assert_op_is_right("linear", x, weight, bias)
    with torch.no_grad():  # with gradients the stock operator is what computes this GELU
        assert_op_is_right("linear", x, weight, bias, "gelu")
    assert_op_is_right("layer_norm_linear", x, None, None, EPS, weight, bias)
    residual = randn(1, 6, 24, dtype=dtype)
    residual[0, 0, 0] = torch.inf
    assert_op_is_right("linear_residual", x, weight, bias, residual, None, None)
    bias[2] = torch.nan
    assert_op_is_right("linear_residual", x, weight, bias, residual, None, torch.zeros(1, dtype=dtype))


def test_one_dimensional_and_four_dimensional_inputs():
    weight = weight_of(24, 40, torch.float32)
    for shape in ((40,), (2, 3, 4, 40)):
        assert_op_is_right("linear", randn(*shape, dtype=torch.float32), weight)


def test_autocast_keeps_a_float32_stream_and_multiplies_in_16_bits():
    x, vector = torch.randn(2, 9, 64), torch.randn(64)
    weight = torch.randn(64, 64) / 8
    with torch.autocast("cpu", torch.bfloat16):
        (qkv,) = ops.layer_norm_linear(x, vector, vector, EPS, [weight], [vector])
        stream = ops.linear_residual(qkv, weight, vector, x, vector)
        normalised = torch.nn.functional.layer_norm(x, (64,), vector, vector, EPS)
        stock_qkv = torch.nn.functional.linear(normalised, weight, vector)
        stock_stream = x + torch.nn.functional.linear(stock_qkv, weight, vector) * vector
    wide_x, wide_vector, wide_weight = x.double(), vector.double(), weight.double()
    exact_qkv = reference.layer_norm_linear(wide_x, wide_vector, wide_vector, EPS, wide_weight, wide_vector)
    exact_stream = reference.linear_residual(exact_qkv, wide_weight, wide_vector, wide_x, wide_vector)
    assert_as_accurate_as_stock(qkv, stock_qkv, exact_qkv, torch.bfloat16, "qkv")
    assert_as_accurate_as_stock(stream, stock_stream, exact_stream, torch.float32, "stream")


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 256])
def test_what_autocast_hands_over_runs_in_the_kernels(width, dtype):
    """Float32 stream, norm and biases, 16-bit weights."""
    x, vector = randn(2, 20, width, dtype=torch.float32), randn(width, dtype=torch.float32)
    weight, h = weight_of(width, width, dtype), randn(2, 20, width, dtype=dtype)
    with torch.autocast("cpu", dtype):
        qkv = assert_op_is_right("layer_norm_linear", x, vector, vector, EPS, weight, vector)[0]
        stream = assert_op_is_right("linear_residual", h, weight, vector, x, vector, None)[0]
    assert qkv.dtype is dtype
    assert stream.dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: ops.linear(x, w[:, :7]), r"weight must have shape \(out_features, 8\)"),
        (lambda x, w: ops.linear(x, w[0]), r"weight must have shape \(out_features, 8\)"),
        (lambda x, w: ops.linear(x, w, torch.ones(3)), r"bias must have shape \(8,\), got \(3,\)"),
        (lambda x, w: ops.linear(x, w, None, "relu"), "one of none, gelu, gelu_tanh; got 'relu'"),
        (
            lambda x, w: ops.layer_norm_linear(x, torch.ones(5), None, EPS, [w], [None]),
            r"norm_weight must have shape \(8,\)",
        ),
        (lambda x, w: ops.linear_residual(x, w, None, x[:1]), r"residual must have the output's shape \(2, 3, 8\)"),
        (lambda x, w: ops.linear_residual(x, w, None, x, torch.ones(7)), r"layer_scale must have shape \(8,\)"),
        (
            lambda x, w: ops.linear_residual(x, w, None, x, None, torch.ones(3)),
            r"drop_path_scale must have shape \(2,\)",
        ),
        (lambda x, w: ops.linear(x, w.to("meta")), "weight is on meta, the input on cpu"),
        (lambda x, w: ops.layer_norm_linear(x, None, None, EPS, [w, w, w[:4]], [None] * 3), "must have one shape"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 8), torch.ones(8, 8))


def test_a_dtype_mixture_outside_autocast_is_refused():
    with pytest.raises(TypeError, match=r"the input is torch.float32 and the weight torch.bfloat16"):
        ops.linear(torch.ones(2, 8), torch.ones(8, 8, dtype=torch.bfloat16))
