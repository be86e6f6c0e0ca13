import itertools

import pytest
import torch
import torch.nn.functional as F

from deit_fast.kernels.linear import layer_norm_linear_backward, linear_backward, settings
from reference.activation import activate
from reference.layer_norm import layer_norm
from reference.linear import linear, linear_residual
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard

EPS = 1e-6
ROWS = (1, 2, 17, 65, 197, 578)
WIDTHS = (64, 192, 384, 768, 50, 100)
HALF = (torch.float16, torch.bfloat16)
# Weights, and what autocast keeps in float32 beside them: residual stream, norm, biases, LayerScale.
MIXTURES = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in HALF]

in_every_mixture = pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "-".join(str(d)[6:] for d in m))


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


def assert_right(run, inputs, grads, stock, reference, needs=None):
    """`run(inputs, grads)` returns a gradient of each input, as stock's and reference's autograd give them.

    In guard bands, the same bits twice. `needs`: which are compared, the others must be None.
    """
    guard = Guard()
    banded = [t if t is None else guard(t) for t in inputs]
    given = [guard(g) for g in grads]
    with guard.outputs():
        found, again = run(banded, given), run(banded, given)
    guard.assert_untouched()
    theirs = gradients(stock, inputs, grads, double=False)
    truth = gradients(reference, inputs, grads, double=True)
    needs = [t is not None for t in inputs] if needs is None else needs
    for i, (need, mine, twice, other, best) in enumerate(zip(needs, found, again, theirs, truth, strict=True)):
        if not need:
            assert mine is None, f"gradient {i} was not asked for"
            continue
        assert torch.equal(mine, twice), f"gradient {i} changes from run to run"
        assert_as_accurate_as_stock(mine, other, best, inputs[i].dtype, name=f"gradient {i}")
    return found


def gradients(function, inputs, grads, double):
    leaves = [t if t is None else (t.double() if double else t).detach().clone() for t in inputs]
    wanted = [t.requires_grad_() for t in leaves if t is not None]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = iter(torch.autograd.grad(outputs, wanted, [g.to(y.dtype) for y, g in zip(outputs, grads, strict=True)]))
    return [t if t is None else next(found) for t in leaves]


# act(x) Wᵀ + b, scaled ---------------------------------------------------------------------------------------------


def branch(activation="none", drop_path_scale=None, needs=(True,) * 4):
    """Run, stock and reference of `drop_path_scale * layer_scale * (act(x) @ weight.T + bias)`."""

    def run(inputs, grads):
        asked = [needs[i] and each is not None for i, each in enumerate(inputs)]
        found = iter(linear_backward(*grads, *inputs, drop_path_scale, activation, None, asked))
        return [next(found) if each else None for each in asked]

    def stock(x, weight, bias, layer_scale=None):
        if activation != "none":
            x = F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
        y = F.linear(x, weight, bias if bias is None else bias.to(weight.dtype))
        if layer_scale is not None:
            y = y * layer_scale
        if drop_path_scale is not None:
            y = y * drop_path_scale.view(-1, 1, 1)
        return y

    def reference(x, weight, bias, layer_scale):
        scale = drop_path_scale if drop_path_scale is None else drop_path_scale.double()
        return linear_residual(activate(x, activation), weight, bias, 0.0, layer_scale, scale)

    return run, stock, reference


def check_branch(x, weight, bias, layer_scale, grad, activation="none", drop_path_scale=None):
    run, stock, reference = branch(activation, drop_path_scale)
    return assert_right(run, (x, weight, bias, layer_scale), (grad,), stock, reference)


def branch_inputs(batch, tokens, out_features, in_features, mixture):
    dtype, stream = mixture
    return (
        randn(batch, tokens, in_features, dtype=dtype),
        weight_of(out_features, in_features, dtype),
        randn(out_features, dtype=stream),
        randn(out_features, dtype=stream),
        randn(batch, tokens, out_features, dtype=stream),
    )


@in_every_mixture
@pytest.mark.parametrize("tokens", ROWS)
def test_any_number_of_rows(tokens, mixture):
    check_branch(*branch_inputs(1, tokens, 64, 64, mixture), "gelu")


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_any_width(width, mixture):
    check_branch(*branch_inputs(2, 5, width, 48, mixture), "gelu_tanh")
    check_branch(*branch_inputs(1, 7, 80, width, mixture))


@in_every_mixture
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_layer_scale", [False, True])
@pytest.mark.parametrize("with_drop_path", [False, True])
def test_every_scale_and_activation(activation, with_layer_scale, with_drop_path, mixture):
    x, weight, bias, layer_scale, grad = branch_inputs(3, 11, 80, 48, mixture)
    drop_path_scale = torch.tensor([1.25, 0.0, 1.25], dtype=mixture[1]) if with_drop_path else None
    layer_scale = layer_scale if with_layer_scale else None
    dx = check_branch(2 * x, weight, bias, layer_scale, grad, activation, drop_path_scale)[0]
    if with_drop_path:
        assert not dx[1].any(), "a dropped sample has no gradient"


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias(dtype):
    x, weight, _, layer_scale, grad = branch_inputs(1, 20, 48, 64, (dtype, dtype))
    check_branch(x, weight, None, None, grad)
    check_branch(x, weight, None, layer_scale, grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    x, weight, bias, layer_scale, grad = branch_inputs(3, 7, 50, 50, (dtype, dtype))
    for view in (strided(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        check_branch(view, strided(weight), strided(bias), strided(layer_scale), strided(grad), "gelu")
    check_branch(x[:1].expand(3, 7, 50), weight, bias, None, grad, "gelu")
    check_branch(x, weight.T, bias, layer_scale, grad[:, :1].expand(3, 7, 50))
    check_branch(x, weight[:1].expand(50, 50), bias, None, grad[0, 0].expand(3, 7, 50))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_dimensional_and_four_dimensional_inputs(dtype):
    weight, bias = weight_of(24, 40, dtype), randn(24, dtype=dtype)
    for shape in ((40,), (2, 3, 4, 40)):
        check_branch(randn(*shape, dtype=dtype), weight, bias, None, randn(*shape[:-1], 24, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_split_where_there_are_many(dtype, monkeypatch):
    """A thousand rows a part are many for the interpreter: here every 64."""
    monkeypatch.setattr(settings, "splits", lambda programs, rows, slots, most: min(4, max(1, rows // 64)))
    for tokens in (255, 256, 258):
        check_branch(*branch_inputs(1, tokens, 48, 64, (dtype, dtype)), "gelu")
        check_layer_norm(*layer_norm_inputs(1, tokens, (48,), 64, (dtype, dtype)))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)])
def test_no_rows(shape):
    x, grad = torch.randn(shape), torch.randn(*shape[:-1], 8)
    weight, bias, layer_scale = torch.randn(8, 16), torch.randn(8), torch.randn(8)
    drop_path_scale = torch.ones(shape[0])
    found = branch("gelu", drop_path_scale)[0]((x, weight, bias, layer_scale), (grad,))
    assert found[0].shape == shape
    assert not any(gradient.any() for gradient in found[1:])


def test_nan_and_infinity_reach_what_depends_on_them():
    x, weight, bias, _, grad = branch_inputs(1, 9, 24, 40, (torch.float32,) * 2)
    grad[0, 2, 3], grad[0, 4, 5] = torch.nan, torch.inf
    run, stock, _ = branch()
    found = run((x, weight, bias, None), (grad,))[:3]
    for mine, exact in zip(found, gradients(stock, (x, weight, bias), (grad,), double=True), strict=True):
        torch.testing.assert_close(mine.double(), exact, equal_nan=True, rtol=1e-4, atol=1e-5)
    dx, dweight, dbias = found
    assert dx[0, 2].isnan().all()
    assert dx[0, [0, 1, 3, 5, 6, 7, 8]].isfinite().all()
    assert dweight[3].isnan().all()
    assert dbias[5].isinf()


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for(needs, activation):
    x, weight, bias, layer_scale, grad = branch_inputs(2, 9, 24, 40, (torch.float32,) * 2)
    run, stock, reference = branch(activation, torch.tensor([1.25, 0.0]), needs)
    assert_right(run, (x, weight, bias, layer_scale), (grad,), stock, reference, needs=needs)


@pytest.mark.parametrize("dtype", HALF)
def test_a_tiny_layer_scale_leaves_float16_its_digits(dtype):
    """Weights times 1e-6 are nothing in float16; the gradient, which a loss scale has made large, is something."""
    x, weight, bias, layer_scale, grad = branch_inputs(1, 9, 24, 40, (dtype, torch.float32))
    run, _, reference = branch()
    inputs, grads = (x, 0.02 * weight, bias, 1e-6 * layer_scale), (1e4 * grad,)
    dx = run(inputs, grads)[0]
    exact = gradients(reference, inputs, grads, double=True)[0]
    assert_as_accurate_as_stock(dx, exact.to(dtype), exact, dtype)


# LayerNorm(x) Wᵀ + b, one projection or three ---------------------------------------------------------------------


def run_layer_norm(needs=None):
    def run(inputs, grads):
        x, norm_weight, norm_bias, *projections = inputs
        weights, biases = projections[: len(grads)], projections[len(grads) :]
        asked = [each is not None and (needs is None or needs[i]) for i, each in enumerate(inputs)]
        found = iter(
            layer_norm_linear_backward(x, norm_weight, norm_bias, EPS, grads, weights, biases, None, None, asked)
        )
        return [next(found) if each else None for each in asked]

    return run


def stock_layer_norm(x, norm_weight, norm_bias, *projections):
    count = len(projections) // 2
    weights, biases = projections[:count], projections[count:]
    y = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, EPS).to(weights[0].dtype)
    return tuple(F.linear(y, w, b if b is None else b.to(w.dtype)) for w, b in zip(weights, biases, strict=True))


def exact_layer_norm(x, norm_weight, norm_bias, *projections):
    count = len(projections) // 2
    y = layer_norm(x, norm_weight, norm_bias, EPS)
    return tuple(linear(y, w, b) for w, b in zip(projections[:count], projections[count:], strict=True))


def check_layer_norm(inputs, grads):
    return assert_right(run_layer_norm(), inputs, grads, stock_layer_norm, exact_layer_norm)


def layer_norm_inputs(batch, tokens, out_features, in_features, mixture):
    dtype, stream = mixture
    inputs = (
        randn(batch, tokens, in_features, dtype=stream),
        randn(in_features, dtype=stream),
        randn(in_features, dtype=stream),
        *(weight_of(n, in_features, dtype) for n in out_features),
        *(randn(n, dtype=stream) for n in out_features),
    )
    return inputs, [randn(batch, tokens, n, dtype=dtype) for n in out_features]


@in_every_mixture
@pytest.mark.parametrize("tokens", ROWS)
def test_layer_norm_of_any_number_of_rows(tokens, mixture):
    check_layer_norm(*layer_norm_inputs(1, tokens, (64,), 64, mixture))


@in_every_mixture
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm_of_any_width(width, mixture):
    check_layer_norm(*layer_norm_inputs(1, 7, (48,), width, mixture))
    check_layer_norm(*layer_norm_inputs(1, 7, (width,), 48, mixture))


@in_every_mixture
@pytest.mark.parametrize("width", (64, 192, 50))
def test_three_projections(width, mixture):
    check_layer_norm(*layer_norm_inputs(1, 9, (width,) * 3, width, mixture))


@in_every_mixture
def test_three_projections_of_any_strides(mixture):
    inputs, grads = layer_norm_inputs(2, 5, (50,) * 3, 50, mixture)
    x, norm_weight, norm_bias, q, k, v, q_bias, _, v_bias = inputs
    check_layer_norm((x, norm_weight, norm_bias, q, strided(k), v, q_bias, None, v_bias), grads)
    check_layer_norm(inputs, torch.stack(grads, dim=2).unbind(2))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_without_parameters(dtype):
    (x, norm_weight, norm_bias, weight, bias), grads = layer_norm_inputs(1, 20, (48,), 64, (dtype, dtype))
    check_layer_norm((x, norm_weight, None, weight, None), grads)
    check_layer_norm((x, None, norm_bias, weight, bias), grads)
    check_layer_norm((x, None, None, weight, None), grads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_of_strided_inputs(dtype):
    inputs, (grad,) = layer_norm_inputs(2, 5, (50,), 50, (dtype, dtype))
    check_layer_norm([strided(t) for t in inputs], [strided(grad)])
    check_layer_norm(inputs, [grad[:1].expand(2, 5, 50)])


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)))
def test_only_what_is_asked_for_of_a_layer_norm(needs):
    inputs, grads = layer_norm_inputs(2, 5, (48,), 40, (torch.float32,) * 2)
    assert_right(run_layer_norm(needs), inputs, grads, stock_layer_norm, exact_layer_norm, needs=needs)


def test_layer_norm_of_no_rows():
    inputs, grads = layer_norm_inputs(2, 0, (8,) * 3, 16, (torch.float32,) * 2)
    dx, *rest = run_layer_norm()(inputs, grads)
    assert dx.shape == inputs[0].shape
    assert not any(gradient.any() for gradient in rest)


# The vendor's GEMM ---------------------------------------------------------------------------------------------------


@pytest.fixture
def by_vendor(monkeypatch):
    monkeypatch.setattr(settings, "vendor", lambda *_: True)


@pytest.mark.usefixtures("by_vendor")
@in_every_mixture
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("with_scales", [False, True])
def test_by_the_vendors_gemm(activation, with_scales, mixture):
    x, weight, bias, layer_scale, grad = branch_inputs(3, 11, 80, 48, mixture)
    drop_path_scale = torch.tensor([1.25, 0.0, 1.25], dtype=mixture[1])
    scales = (layer_scale, drop_path_scale) if with_scales else (None, None)
    check_branch(x, weight, bias, scales[0], grad, activation, scales[1])


@pytest.mark.usefixtures("by_vendor")
@in_every_mixture
@pytest.mark.parametrize("width", (64, 50))
def test_layer_norm_by_the_vendors_gemm(width, mixture):
    check_layer_norm(*layer_norm_inputs(2, 9, (96,), width, mixture))
    check_layer_norm(*layer_norm_inputs(2, 9, (width,) * 3, width, mixture))


@pytest.mark.usefixtures("by_vendor")
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs_of_the_vendors_gemm(dtype):
    x, weight, bias, layer_scale, grad = branch_inputs(3, 7, 50, 50, (dtype, dtype))
    check_branch(strided(x), strided(weight), strided(bias), strided(layer_scale), strided(grad), "gelu")
    check_branch(x[:1].expand(3, 7, 50), weight, None, None, grad[0, 0].expand(3, 7, 50), "gelu")
    check_branch(x, weight[:1].expand(50, 50), bias, None, grad[:, :1].expand(3, 7, 50))
    inputs, grads = layer_norm_inputs(2, 5, (50,) * 3, 50, (dtype, dtype))
    check_layer_norm([strided(t) for t in inputs], torch.stack(grads, dim=2).unbind(2))


@pytest.mark.usefixtures("by_vendor")
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)))
def test_only_what_is_asked_for_by_the_vendors_gemm(needs):
    x, weight, bias, layer_scale, grad = branch_inputs(2, 9, 24, 40, (torch.float32,) * 2)
    run, stock, reference = branch("gelu", torch.tensor([1.25, 0.0]), needs)
    assert_right(run, (x, weight, bias, layer_scale), (grad,), stock, reference, needs=needs)


@pytest.mark.usefixtures("by_vendor")
def test_no_rows_for_the_vendors_gemm():
    test_no_rows((0, 5, 16))
    test_layer_norm_of_no_rows()
