"""The MLP half of a block in two operators: what lies between them is data, and has a gradient all the same."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import reference
from deit_fast import ops
from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.kernels.layer_norm import forward as layer_norm_forward
from deit_fast.kernels.linear import settings
from deit_fast.ops import backend
from tests.support.compare import BATCHES, DTYPES, TOKENS, WIDTHS, assert_op_is_right, randn, strided

EPS = 1e-6


@pytest.fixture(params=["kernels", "the vendor's GEMM"])
def either_product(request, monkeypatch):
    """As shipped, and as `deit-fast tune` may choose."""
    if request.param != "kernels":
        monkeypatch.setattr(settings, "vendor", lambda *_: True)


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


def with_activated(pre_activation, activation="gelu"):
    # In float64: of +inf, PyTorch's float32 GELU is NaN on processors with AVX-512.
    activated = F.gelu(pre_activation.double(), approximate="tanh" if activation == "gelu_tanh" else "none")
    return pre_activation, activated.to(pre_activation.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype):
    x, norm = randn(1, tokens, 64, dtype=dtype), randn(64, dtype=dtype)
    assert_op_is_right("layer_norm_fc1", x, norm, norm, EPS, weight_of(96, 64, dtype), randn(96, dtype=dtype), "gelu")
    hidden = with_activated(randn(1, tokens, 96, dtype=dtype))
    assert_op_is_right("fc2_residual", *hidden, weight_of(64, 96, dtype), norm, x, norm, randn(1, dtype=dtype), "gelu")


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, dtype):
    x, norm = randn(2, 9, width, dtype=dtype), randn(width, dtype=dtype)
    for bias in (None, randn(100, dtype=dtype)):
        assert_op_is_right("layer_norm_fc1", x, norm, None, EPS, weight_of(100, width, dtype), bias, "gelu_tanh")
    hidden = with_activated(randn(2, 9, 100, dtype=dtype), "gelu_tanh")
    for scales in ((None, None), (norm, randn(2, dtype=dtype))):
        assert_op_is_right("fc2_residual", *hidden, weight_of(width, 100, dtype), norm, x, *scales, "gelu_tanh")


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch(batch, dtype):
    x, square, vector = randn(batch, 5, 96, dtype=dtype), weight_of(96, 96, dtype), randn(96, dtype=dtype)
    assert_op_is_right("layer_norm_fc1", x, vector, vector, EPS, square, vector, "gelu")
    assert_op_is_right("fc2_residual", *with_activated(x), square, vector, x, vector, randn(batch, dtype=dtype), "gelu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    x, weight, vector = randn(20, 20, 50, dtype=dtype), weight_of(50, 50, dtype), strided(randn(50, dtype=dtype))
    for view in (strided(x), x[:1].expand(20, 20, 50), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for matrix in (strided(weight), weight.T):
            assert_op_is_right("layer_norm_fc1", view, vector, vector, EPS, matrix, vector, "gelu")
            pair = view, strided(F.gelu(view))
            assert_op_is_right("fc2_residual", *pair, matrix, vector, strided(x), vector, None, "gelu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_where_float64_has_them(dtype):
    x, weight, bias = randn(1, 6, 40, dtype=dtype), weight_of(24, 40, dtype), randn(24, dtype=dtype)
    x[0, 1, 3], x[0, 2, 5], x[0, 4, 7] = torch.nan, torch.inf, -torch.inf
    assert_op_is_right("layer_norm_fc1", x, None, None, EPS, weight, bias, "gelu")
    assert_op_is_right(
        "fc2_residual", *with_activated(x), weight, bias, randn(1, 6, 24, dtype=dtype), None, None, "gelu"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_autocast_hands_over_runs_in_the_kernels(dtype):
    """Float32 stream, norm and biases, 16-bit weights."""
    x, vector, weight = randn(2, 20, 64, dtype=torch.float32), randn(64, dtype=torch.float32), weight_of(64, 64, dtype)
    with torch.autocast("cpu", dtype):
        hidden = assert_op_is_right("layer_norm_fc1", x, vector, vector, EPS, weight, vector, "gelu")
        stream = assert_op_is_right("fc2_residual", *hidden, weight, vector, x, vector, None, "gelu")[0]
    assert [each.dtype for each in (*hidden, stream)] == [dtype, dtype, torch.float32]


# Gradients through both -------------------------------------------------------------------------------------------


def leaves(dtype=torch.float32):
    shapes = (3, 5, 64), (64,), (64,), (96, 64), (96,), (64, 96), (64,)
    return [randn(*shape, dtype=dtype, scale=0.3).requires_grad_() for shape in shapes]


def both(first, second, x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias):
    """The MLP half with either operator by another route: None is the automatic one, on a CPU the stock form."""
    with backend.forced(first):
        hidden, activated = ops.layer_norm_fc1(x, norm_weight, norm_bias, EPS, fc1, fc1_bias)
    with backend.forced(second):
        return ops.fc2_residual(hidden, activated, fc2, fc2_bias, x)


@pytest.mark.parametrize("first", [None, "torch", "triton"])
@pytest.mark.parametrize("second", [None, "torch", "triton"])
def test_gradients_are_whole_by_every_mix_of_routes(first, second):
    inputs = leaves()
    y = both(first, second, *inputs)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    x, norm_weight, norm_bias, *parameters = exact
    wanted = torch.autograd.grad(reference.mlp(x, norm_weight, norm_bias, EPS, *parameters), exact, grad.double())
    for ours, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chosen", [None, "torch", "triton"])
def test_the_activation_is_data_for_whoever_made_it_apart(chosen):
    hidden, weight, residual = torch.randn(2, 5, 48, requires_grad=True), torch.randn(32, 48), torch.randn(2, 5, 32)
    expected = torch.autograd.grad(F.linear(F.gelu(hidden), weight).sum(), hidden)[0]
    with backend.forced(chosen):
        for activated in (F.gelu(hidden).detach(), F.gelu(hidden)):
            y = ops.fc2_residual(hidden, activated, weight, None, residual)
            torch.testing.assert_close(torch.autograd.grad(y.sum(), hidden)[0], expected)


def test_frozen_parts_of_the_stock_form_cost_no_second_activation(monkeypatch):
    """What leads from the pre-activation goes through the activated one where an operator has not cut it off."""
    with backend.forced(None):
        hidden, activated = ops.layer_norm_fc1(*leaves()[:3], EPS, *leaves()[3:5])
        monkeypatch.setattr(F, "gelu", None)
        x = torch.randn(3, 5, 64)
        ops.fc2_residual(hidden, activated, torch.randn(64, 96), None, x)
        ops.fc2_residual(hidden.detach(), activated.detach(), torch.randn(64, 96, requires_grad=True), None, x)


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_the_stock_form_computes_the_activation_once(chosen, monkeypatch):
    calls = []
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda *args, **options: calls.append(1) or gelu(*args, **options))
    both(chosen, chosen, *leaves())
    assert len(calls) == 1


def test_a_capacity_below_the_kept_count_leaves_what_lies_past_it_alone():
    x, kept = torch.randn(4, 5, 64), ops.keep_samples(torch.tensor([1.0, 1.0, 0.0, 1.0]))
    memory = torch.full((2, 5, 64), 7.0)
    with mock.patch.object(layer_norm_forward.torch, "empty", lambda *args, **options: memory[:1]), torch.no_grad():
        layer_norm_forward.layer_norm(x, None, None, EPS, kept=kept, capacity=1)
    assert torch.equal(memory[1], torch.full((5, 64), 7.0)) and not torch.equal(memory[0], memory[1])


def test_compiled_and_under_a_functional_transform_gradients_are_the_same():
    inputs = leaves()
    expected = torch.autograd.grad(both("torch", "torch", *inputs).sum(), inputs)
    with backend.forced("torch"):
        compiled = torch.compile(lambda *args: both("torch", "torch", *args), backend="aot_eager")
        found = torch.autograd.grad(compiled(*inputs).sum(), inputs)
        transformed = torch.func.grad(lambda *args: both("torch", "torch", *args).sum(), tuple(range(7)))
        functional = transformed(*[t.detach() for t in inputs])
    for one, other, wanted in zip(found, functional, expected, strict=True):
        torch.testing.assert_close(one, wanted)
        torch.testing.assert_close(other, wanted)


@pytest.mark.parametrize("chosen", ["torch", "triton"])
def test_what_comes_out_of_the_activation_is_not_saved(chosen):
    inputs = leaves()
    with backend.forced(chosen):
        saved = saved_bytes(torch.nn.ParameterList(inputs), lambda: both(chosen, chosen, *inputs))
    # What goes into it.
    assert saved == 4 * 3 * 5 * 96


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: ops.layer_norm_fc1(x, None, None, EPS, w, None, "none"),
            "without an activation call layer_norm_",
        ),
        (
            lambda x, w: ops.layer_norm_fc1(x, None, None, EPS, w[:, :7], None),
            r"weight must have shape \(out_features, 8",
        ),
        (lambda x, w: ops.fc2_residual(x, x[:1], w, None, x), r"activated must be like pre_activation, .* \(2, 3, 8\)"),
        (lambda x, w: ops.fc2_residual(x, x, w, None, x[:1]), r"residual must have the output's shape \(2, 3, 8\)"),
        (
            lambda x, w: ops.fc2_residual(x, x, w, None, x, activation="relu"),
            "one of none, gelu, gelu_tanh; got 'relu'",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3, 8), torch.ones(8, 8))


def test_layer_norm_linear_refuses_a_gradient_through_its_epilogues_activation():
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(8, 8)
    with backend.forced("torch"), pytest.raises(NotImplementedError, match=r"call ops\.layer_norm_fc1"):
        ops.layer_norm_linear(x, None, None, EPS, [weight], [None], activation="gelu")
