"""Every gradient of every operator against float64, on the kernels and on the CPU path."""

import pytest
import torch

from deit_fast import ops
from tests.support.compare import DTYPES, assert_gradients_are_right, randn, strided, ways_of

EPS = 1e-6
BACKENDS = ("triton", "torch")
TOKENS = (1, 2, 17, 65, 198)
WIDTHS = (64, 192, 50)

everywhere = pytest.mark.parametrize("chosen", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


def with_activated(x):
    return x, torch.nn.functional.gelu(x)


def arguments_of(op, batch, tokens, width, dtype):
    x, vector = randn(batch, tokens, width, dtype=dtype), randn(width, dtype=dtype)
    bias, square = randn(width, dtype=dtype), weight_of(width, width, dtype)
    hidden = 2 * width
    drop_path_scale = torch.tensor([1.25, 0.0, 1.25], dtype=dtype)[:batch]
    if op == "layer_norm_fc1":
        return x, vector, bias, EPS, weight_of(hidden, width, dtype), randn(hidden, dtype=dtype), "gelu"
    if op == "fc2_residual":
        pre_activation, weight = randn(batch, tokens, hidden, dtype=dtype), weight_of(width, hidden, dtype)
        return *with_activated(pre_activation), weight, bias, x, vector, drop_path_scale, "gelu"
    return {
        "layer_norm": (x, vector, bias, EPS),
        "add_layer_norm": (x, randn(batch, tokens, width, dtype=dtype), vector, bias, EPS),
        "linear": (x, square, bias),
        "layer_norm_linear": (x, vector, bias, EPS, weight_of(hidden, width, dtype), randn(hidden, dtype=dtype)),
        "layer_norm_qkv": (x, vector, bias, EPS, square, bias, square.flip(0), None, square.flip(1), bias),
        "linear_residual": (
            randn(batch, tokens, hidden, dtype=dtype),
            weight_of(width, hidden, dtype),
            bias,
            x,
            vector,
            drop_path_scale,
        ),
        "mlp": (
            x,
            vector,
            bias,
            EPS,
            weight_of(hidden, width, dtype),
            randn(hidden, dtype=dtype),
            weight_of(width, hidden, dtype),
            bias,
            vector,
            drop_path_scale,
            "gelu_tanh",
        ),
    }[op]


ROW_OPS = (
    "layer_norm", "add_layer_norm", "linear", "layer_norm_linear", "layer_norm_qkv", "linear_residual",
    "layer_norm_fc1", "fc2_residual", "mlp",
)  # fmt: skip
# Argument positions with a gradient, where not every floating tensor has one (drop_path_scale and activated are data).
WRT = {"linear_residual": (0, 1, 2, 3, 4), "fc2_residual": (0, 2, 3, 4, 5), "mlp": (0, 1, 2, 4, 5, 6, 7, 8)}


@everywhere
@in_every_dtype
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("op", ROW_OPS)
def test_any_number_of_tokens(op, tokens, dtype, chosen):
    assert_gradients_are_right(op, *arguments_of(op, 1, tokens, 64, dtype), chosen=chosen, wrt=WRT.get(op))


@everywhere
@in_every_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", ROW_OPS)
def test_any_width(op, width, dtype, chosen):
    assert_gradients_are_right(op, *arguments_of(op, 3, 9, width, dtype), chosen=chosen, wrt=WRT.get(op))


@everywhere
@pytest.mark.parametrize("op", ROW_OPS)
def test_an_empty_batch_has_zero_parameter_gradients(op, chosen):
    arguments = arguments_of(op, 0, 9, 64, torch.float32)
    for gradient in assert_gradients_are_right(op, *arguments, chosen=chosen, wrt=WRT.get(op)):
        assert not gradient.count_nonzero()


@everywhere
@in_every_dtype
@pytest.mark.parametrize("op", ROW_OPS)
def test_strided_inputs(op, dtype, chosen):
    arguments = [strided(a) if isinstance(a, torch.Tensor) else a for a in arguments_of(op, 2, 7, 50, dtype)]
    assert_gradients_are_right(op, *arguments, chosen=chosen, wrt=WRT.get(op))


@everywhere
@in_every_dtype
@pytest.mark.parametrize("tokens", (*TOKENS, 197, 257))
def test_attention(tokens, dtype, chosen):
    assert_gradients_are_right("attention", randn(1, tokens, 3, 1, 64, dtype=dtype), 0.125, chosen=chosen)


@everywhere
@in_every_dtype
@pytest.mark.parametrize("head_dim", [32, 80, 96, 128])
def test_attention_of_separate_inputs_and_every_head_width(head_dim, dtype, chosen):
    q = randn(2, 33, 2, head_dim, dtype=dtype)
    k, v = randn(2, 70, 2, head_dim, dtype=dtype), strided(randn(2, 70, 2, head_dim, dtype=dtype))
    assert_gradients_are_right("attention_qkv", q, k, v, head_dim**-0.5, chosen=chosen)


@everywhere
@in_every_dtype
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_patch_embed(prefix, masked, dtype, chosen):
    images, weight = randn(2, 3, 16, 24, dtype=dtype), randn(64, 3, 8, 8, dtype=dtype, scale=0.07)
    tokens = [randn(1, 1, 64, dtype=dtype) if prefix > i else None for i in range(2)]
    mask_token = randn(1, 1, 64, dtype=dtype) if masked else None
    mask = torch.rand(2, 6) > 0.5 if masked else None
    for rows in (6, 6 + prefix):
        pos_embed = randn(1, rows, 64, dtype=dtype)
        arguments = (images, weight, randn(64, dtype=dtype), pos_embed, *tokens, mask_token, mask, None, None)
        assert_gradients_are_right("patch_embed", *arguments, chosen=chosen)


@everywhere
def test_only_the_gradients_asked_for_are_computed(chosen):
    """Frozen weights, linear probes: what is not asked for is not in the backward operator's answer."""
    x, vector, weight = torch.randn(2, 5, 64), torch.randn(64), torch.randn(64, 64)
    backward = torch.ops.deit_fast.linear_backward
    found = backward(x, x, weight, vector, None, None, "none", None, [False, True, False, False])
    assert [tuple(g.shape) for g in found] == [(64, 64)]
    (y,) = ops.layer_norm_linear(x, vector, vector, EPS, [weight], [vector.clone().requires_grad_()])
    y.sum().backward()


@pytest.mark.parametrize("op", ["layer_norm_linear", "linear_residual", "layer_norm_fc1", "fc2_residual", "mlp"])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_gives_gradients_in_the_parameters_own_dtype(op, low):
    arguments = arguments_of(op, 3, 9, 64, torch.float32)
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    for index in WRT.get(op, range(len(arguments))):
        if isinstance(arguments[index], torch.Tensor):
            arguments[index].requires_grad_()
    with torch.autocast("cpu", low):
        y = ways_of(op).ours(*arguments)
        y = y if isinstance(y, torch.Tensor) else y[0]
    y.float().sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in tensors if t.requires_grad)
