"""Kernels that skip the samples drop path drops: what the same kernels make of the kept samples alone, bit by bit."""

import pytest
import torch

from deit_fast.kernels import attention, drop_path, linear, mlp
from deit_fast.kernels.layer_norm.backward import normalised_rows
from deit_fast.kernels.linear import settings
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import NAN_BYTE, Guard

EPS = 1e-6
HALF = (torch.float16, torch.bfloat16)
# Weights, and what autocast keeps in float32 beside them.
MIXTURES = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in HALF]
# Batch, tokens, and the samples kept: none, the first, the last, every second, all.
CASES = [
    (1, 17, []),
    (1, 65, [0]),
    (3, 1, [0]),
    (3, 198, [2]),
    (5, 1, [0, 2, 4]),
    (5, 17, []),
    (5, 17, [0, 2, 4]),
    (5, 17, [0, 1, 2, 3, 4]),
    (5, 65, [1, 3]),
]


def name_of_case(case):
    batch, tokens, kept = case
    return f"{batch}x{tokens}-{''.join(map(str, kept)) or 'none'}"


in_every_mixture = pytest.mark.parametrize("mixture", MIXTURES, ids=lambda m: "-".join(str(d)[6:] for d in m))
in_some_cases = pytest.mark.parametrize("case", CASES[::3], ids=name_of_case)
in_every_case = pytest.mark.parametrize("case", CASES, ids=name_of_case)


class Kept:
    """The kept samples of a batch, and tensors packed to hold them: at once the smallest, then whole batches."""

    def __init__(self, batch, samples, dtype=torch.float32):
        self.batch = batch
        self.samples = torch.tensor(samples, dtype=torch.long)
        self.dropped = torch.tensor([i for i in range(batch) if i not in samples], dtype=torch.long)
        self.scale = torch.zeros(batch, dtype=dtype)
        self.scale[self.samples] = 1.25
        self.count = len(samples)
        self.kept = drop_path.keep_samples(self.scale)

    @property
    def capacities(self):
        return sorted({self.count, self.batch})

    def gather(self, full):
        return full.index_select(0, self.samples)

    def pack(self, gathered, capacity):
        """NaN where no kept sample is: never to be read."""
        packed = torch.full((capacity, *gathered.shape[1:]), torch.nan, dtype=gathered.dtype)
        packed[: self.count] = gathered
        return packed

    def assert_packed(self, packed, gathered, capacity):
        assert packed.shape == (capacity, *gathered.shape[1:])
        assert same_bits(packed[: self.count], gathered)
        beyond = packed[self.count :].contiguous()
        assert (beyond.view(torch.uint8) == NAN_BYTE).all(), "rows beyond the kept ones were written"

    def assert_full(self, full, gathered, dropped):
        assert same_bits(full[self.samples], gathered)
        assert same_bits(full[self.dropped], dropped.index_select(0, self.dropped).to(full.dtype))


def same_bits(x, y):
    assert x.dtype == y.dtype
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def in_guard_bands(function, *inputs, **named):
    """`function` of its inputs; outputs are `NAN_BYTE` until they are written."""
    guard = Guard()
    inputs = [guard(t) if isinstance(t, torch.Tensor) else t for t in inputs]
    named = {name: guard(t) if isinstance(t, torch.Tensor) else t for name, t in named.items()}
    with guard.outputs():
        result = function(*inputs, **named)
    guard.assert_untouched()
    return result


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


def full_of(samples, *shape, dtype):
    """Whole batches; what drop path drops may be anything."""
    x = randn(samples.batch, *shape, dtype=dtype)
    x[samples.dropped, ..., 0] = torch.nan
    x[samples.dropped, ..., 1] = -0.0
    return x


# Forward ----------------------------------------------------------------------------------------------------------


def layer_norm_linear(x, norm_weight, norm_bias, eps, weight, bias, **named):
    (y,) = linear.layer_norm_linear(x, norm_weight, norm_bias, eps, [weight], [bias], **named)
    return y


def check_layer_norm_linear(samples, x, *parameters):
    gathered = layer_norm_linear(samples.gather(x), *parameters)
    for capacity in samples.capacities:
        y = in_guard_bands(layer_norm_linear, x, *parameters, kept=samples.kept, capacity=capacity)
        samples.assert_packed(y, gathered, capacity)


@in_every_mixture
@in_every_case
def test_layer_norm_linear(case, mixture):
    batch, tokens, kept = case
    dtype, stream = mixture
    samples = Kept(batch, kept)
    parameters = (
        randn(64, dtype=stream),
        randn(64, dtype=stream),
        EPS,
        weight_of(96, 64, dtype),
        randn(96, dtype=stream),
    )
    check_layer_norm_linear(samples, full_of(samples, tokens, 64, dtype=stream), *parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_linear_of_any_strides_and_width(dtype):
    samples = Kept(3, [0, 2])
    x = full_of(samples, 17, 50, dtype=dtype)
    parameters = None, None, EPS, strided(weight_of(40, 50, dtype)), None
    for view in (strided(x), x.transpose(0, 1).contiguous().transpose(0, 1), x.view(3, 1, 17, 50)):
        check_layer_norm_linear(samples, view, *parameters)


@in_every_mixture
@in_every_case
def test_layer_norm_fc1(case, mixture):
    batch, tokens, kept = case
    dtype, stream = mixture
    samples = Kept(batch, kept)
    x = full_of(samples, tokens, 64, dtype=stream)
    parameters = randn(64, dtype=stream), None, EPS, weight_of(96, 64, dtype), randn(96, dtype=stream), "gelu"
    gathered = linear.layer_norm_fc1(samples.gather(x), *parameters)
    for capacity in samples.capacities:
        found = in_guard_bands(linear.layer_norm_fc1, x, *parameters, kept=samples.kept, capacity=capacity)
        for mine, other in zip(found, gathered, strict=True):
            samples.assert_packed(mine, other, capacity)


def test_capacity_is_the_batch_unless_given():
    samples = Kept(3, [1])
    x = full_of(samples, 5, 32, dtype=torch.float32)
    parameters = None, None, EPS, torch.randn(16, 32), None
    y = in_guard_bands(layer_norm_linear, x, *parameters, kept=samples.kept)
    samples.assert_packed(y, layer_norm_linear(samples.gather(x), *parameters), 3)


def check_linear_residual(samples, x, weight, bias, residual, layer_scale):
    drop_path_scale = samples.scale.to(residual.dtype)
    parameters = weight, bias
    gathered = linear.linear_residual(
        x, *parameters, samples.gather(residual), layer_scale, samples.gather(drop_path_scale)
    )
    for capacity in samples.capacities:
        packed = samples.pack(x, capacity)
        y = in_guard_bands(
            linear.linear_residual,
            *(packed, *parameters, residual, layer_scale, drop_path_scale),
            kept=samples.kept,
        )
        samples.assert_full(y, gathered, residual)


def linear_residual_inputs(case, mixture):
    batch, tokens, kept = case
    dtype, stream = mixture
    samples = Kept(batch, kept)
    return (
        samples,
        randn(samples.count, tokens, 80, dtype=dtype),
        weight_of(64, 80, dtype),
        randn(64, dtype=stream),
        full_of(samples, tokens, 64, dtype=stream),
        randn(64, dtype=stream),
    )


@in_every_mixture
@in_every_case
def test_linear_residual(case, mixture):
    check_linear_residual(*linear_residual_inputs(case, mixture))


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_residual_of_any_strides_and_width(dtype):
    samples = Kept(3, [0, 2])
    x, residual = randn(2, 17, 50, dtype=dtype), full_of(samples, 17, 50, dtype=dtype)
    weight = strided(weight_of(50, 50, dtype))
    for view in (strided(residual), residual.transpose(0, 1).contiguous().transpose(0, 1)):
        check_linear_residual(samples, x, weight, None, view, None)


def test_an_infinite_layer_scale_leaves_dropped_samples_alone():
    samples = Kept(3, [1])
    residual = full_of(samples, 5, 32, dtype=torch.float32)
    layer_scale = torch.full((32,), torch.inf)
    check_linear_residual(samples, torch.randn(1, 5, 48), torch.randn(32, 48), torch.randn(32), residual, layer_scale)


def attend(qkv, scale, **named):
    return attention.attention([qkv], scale, **named)


@pytest.mark.parametrize("dtype", DTYPES)
@in_every_case
def test_attention(case, dtype):
    batch, tokens, kept = case
    head_dim = 80
    samples = Kept(batch, kept)
    qkv = randn(samples.count, tokens, 3, 2, head_dim, dtype=dtype)
    gathered = attend(qkv, head_dim**-0.5)
    for capacity in samples.capacities:
        packed = samples.pack(qkv, capacity)
        found = in_guard_bands(attend, packed, head_dim**-0.5, kept=samples.kept)
        for mine, other in zip(found, gathered, strict=True):
            samples.assert_packed(mine, other, capacity)


@in_every_mixture
@in_every_case
def test_mlp(case, mixture):
    batch, tokens, kept = case
    dtype, stream = mixture
    samples = Kept(batch, kept, stream)
    x = full_of(samples, tokens, 80, dtype=stream)
    parameters = (
        *(randn(80, dtype=stream), randn(80, dtype=stream), EPS),
        *(weight_of(64, 80, dtype), randn(64, dtype=stream), weight_of(80, 64, dtype), randn(80, dtype=stream)),
        randn(80, dtype=stream),
    )
    gathered = mlp.mlp(samples.gather(x), *parameters, samples.gather(samples.scale), "gelu")
    y = in_guard_bands(mlp.mlp, x, *parameters, samples.scale, "gelu", kept=samples.kept)
    samples.assert_full(y, gathered, x)


# Backward ---------------------------------------------------------------------------------------------------------


def assert_same(found, expected):
    """Of lists of tensors and None."""
    for mine, other in zip(found, expected, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or torch.equal(mine, other)


NEEDS = (True, True, True, True)
ONLY_BIAS = (False, False, True, False)


def check_linear_backward(samples, x, grad, weight, bias, layer_scale, activation):
    parameters = weight, bias, layer_scale
    drop_path_scale = samples.scale.to(grad.dtype)

    def run(grad, x, drop_path_scale, needs=NEEDS, kept=None):
        asked = [need and each is not None for need, each in zip(needs, (x, *parameters), strict=True)]
        return linear.linear_backward(grad, x, *parameters, drop_path_scale, activation, kept, asked)

    gathered = samples.gather(grad), x, samples.gather(drop_path_scale)
    dx, *others = run(*gathered)
    for capacity in samples.capacities:
        packed = grad, samples.pack(x, capacity), drop_path_scale
        found, *again = in_guard_bands(run, *packed, kept=samples.kept)
        samples.assert_packed(found, dx, capacity)
        assert_same(again, others)
        # Without x's gradient the activation is ATen's, which rounds by an element's place in a vector.
        for needs in (ONLY_BIAS, (False, True, True, True)) if activation == "none" else (ONLY_BIAS,):
            assert_same(in_guard_bands(run, *packed, needs, kept=samples.kept), run(*gathered, needs))


@in_every_mixture
@in_every_case
def test_gradients_of_linear_residual(case, mixture):
    samples, x, weight, bias, grad, layer_scale = linear_residual_inputs(case, mixture)
    check_linear_backward(samples, x, grad, weight, bias, layer_scale, "gelu")


@in_every_mixture
@in_some_cases
def test_gradients_of_linear_residual_without_activation(case, mixture):
    samples, x, weight, bias, grad, layer_scale = linear_residual_inputs(case, mixture)
    check_linear_backward(samples, x, grad, weight, bias, layer_scale, "none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_linear_residual_of_any_strides_and_width(dtype):
    samples = Kept(3, [0, 2])
    x, grad = randn(2, 17, 50, dtype=dtype), full_of(samples, 17, 50, dtype=dtype)
    for view in (strided(grad), grad.transpose(0, 1).contiguous().transpose(0, 1)):
        check_linear_backward(samples, x, view, strided(weight_of(50, 50, dtype)), None, None, "gelu_tanh")


def check_layer_norm_linear_backward(samples, x, grad, residual_grad, norm_weight, norm_bias, weight, bias):
    def run(grad, x, residual_grad, needs=(True,) * 5, kept=None):
        given = x, norm_weight, norm_bias, weight, bias
        asked = [need and each is not None for need, each in zip(needs, given, strict=True)]
        return linear.layer_norm_linear_backward(
            x, norm_weight, norm_bias, EPS, [grad], [weight], [bias], kept, residual_grad, asked
        )

    of_residual = None if residual_grad is None else samples.gather(residual_grad)
    gathered = grad, samples.gather(x), of_residual
    dx, *others = run(*gathered)
    normalised = normalised_rows(samples.gather(x), EPS, grad.dtype)
    for capacity in samples.capacities:
        packed = samples.pack(grad, capacity), x, residual_grad
        found, *again = in_guard_bands(run, *packed, kept=samples.kept)
        samples.assert_full(found, dx, torch.zeros_like(x) if residual_grad is None else residual_grad)
        assert_same(again, others)
        for needs in ((False, False, False, False, True), (False, True, True, True, True)):
            assert_same(in_guard_bands(run, *packed, needs, kept=samples.kept), run(*gathered, needs))
        alone = in_guard_bands(normalised_rows, x, EPS, grad.dtype, kept=samples.kept, capacity=capacity)
        samples.assert_packed(alone, normalised, capacity)


def check_gradients_of_layer_norm_linear(case, mixture, with_residual):
    batch, tokens, kept = case
    dtype, stream = mixture
    samples = Kept(batch, kept)
    check_layer_norm_linear_backward(
        samples,
        full_of(samples, tokens, 80, dtype=stream),
        randn(samples.count, tokens, 64, dtype=dtype),
        full_of(samples, tokens, 80, dtype=stream) if with_residual else None,
        *(randn(80, dtype=stream), randn(80, dtype=stream), weight_of(64, 80, dtype), randn(64, dtype=stream)),
    )


@in_every_mixture
@in_every_case
def test_gradients_of_layer_norm_linear(case, mixture):
    check_gradients_of_layer_norm_linear(case, mixture, with_residual=True)


@in_every_mixture
@in_some_cases
def test_gradients_of_layer_norm_linear_alone(case, mixture):
    check_gradients_of_layer_norm_linear(case, mixture, with_residual=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_layer_norm_linear_of_any_strides_and_width(dtype):
    samples = Kept(3, [0, 2])
    x, residual_grad = (full_of(samples, 17, 50, dtype=dtype) for _ in range(2))
    parameters = None, None, strided(weight_of(40, 50, dtype)), None
    grad = randn(2, 17, 40, dtype=dtype)
    for view in (strided(x), x.transpose(0, 1).contiguous().transpose(0, 1)):
        check_layer_norm_linear_backward(samples, view, grad, strided(residual_grad), *parameters)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_rows_are_split_evenly(dtype, monkeypatch):
    """As many parts as for whole batches, each of as many rows as the kept samples have for it."""
    monkeypatch.setattr(settings, "splits", lambda *_: 4)
    samples = Kept(5, [1, 4])
    weight, bias = weight_of(48, 64, dtype), randn(48, dtype=dtype)
    x, grad = randn(2, 65, 64, dtype=dtype), full_of(samples, 65, 48, dtype=dtype)
    check_linear_backward(samples, x, grad, weight, bias, randn(48, dtype=dtype), "gelu")
    x, grad = full_of(samples, 65, 64, dtype=dtype), randn(2, 65, 48, dtype=dtype)
    check_layer_norm_linear_backward(samples, x, grad, None, None, randn(64, dtype=dtype), weight, bias)


@pytest.mark.parametrize("dtype", DTYPES)
@in_every_case
def test_gradients_of_attention(case, dtype):
    batch, tokens, kept = case
    head_dim = 80
    samples = Kept(batch, kept)
    qkv = randn(samples.count, tokens, 3, 2, head_dim, dtype=dtype)
    grad = randn(samples.count, tokens, 2 * head_dim, dtype=dtype)
    scale = head_dim**-0.5
    out, log_sum_exp = attend(qkv, scale)

    def run(grad, qkv, out, log_sum_exp, kept=None):
        (dqkv,) = attention.attention_backward(grad, [qkv], out, log_sum_exp, scale, kept)
        return dqkv

    gathered = run(grad, qkv, out, log_sum_exp)
    for capacity in samples.capacities:
        packed = [samples.pack(t, capacity) for t in (grad, qkv, out, log_sum_exp)]
        samples.assert_packed(in_guard_bands(run, *packed, kept=samples.kept), gathered, capacity)
