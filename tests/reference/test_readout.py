"""The readout block is the first rows of the whole block: its output and every gradient, in float64."""

import pytest
import torch

from reference import attention, block, layer_norm_linear, readout, readout_attention, readout_block

WIDTH, HEADS, TOKENS, BATCH = 48, 3, 11, 3
EPS = 1e-6


def block_parameters(bias=True, layer_scale=True, affine=True):
    shapes = {
        "norm1.weight": (WIDTH,),
        "norm1.bias": (WIDTH,),
        "attn.qkv.weight": (3 * WIDTH, WIDTH),
        "attn.qkv.bias": (3 * WIDTH,),
        "attn.proj.weight": (WIDTH, WIDTH),
        "attn.proj.bias": (WIDTH,),
        "ls1.gamma": (WIDTH,),
        "norm2.weight": (WIDTH,),
        "norm2.bias": (WIDTH,),
        "mlp.fc1.weight": (4 * WIDTH, WIDTH),
        "mlp.fc1.bias": (4 * WIDTH,),
        "mlp.fc2.weight": (WIDTH, 4 * WIDTH),
        "mlp.fc2.bias": (WIDTH,),
        "ls2.gamma": (WIDTH,),
    }
    left_out = set()
    if not bias:
        left_out |= {name for name in shapes if name.endswith("bias")}
    if not layer_scale:
        left_out |= {"ls1.gamma", "ls2.gamma"}
    if not affine:
        left_out |= {name for name in shapes if name.startswith("norm1")}
    return {
        name: torch.randn(shape, dtype=torch.float64) * (1 if len(shape) == 1 else 0.3)
        for name, shape in shapes.items()
        if name not in left_out
    }


def output_and_gradients(function, x, parameters, grad):
    """The gradients of x and of every parameter, by name."""
    x = x.clone().requires_grad_()
    parameters = {name: parameter.clone().requires_grad_() for name, parameter in parameters.items()}
    y = function(x, parameters)
    found = torch.autograd.grad(y, [x, *parameters.values()], grad)
    return y, dict(zip(["x", *parameters], found, strict=True))


def assert_is_the_whole_block(parameters, readout_rows, tokens=TOKENS, scales=(None, None)):
    x = torch.randn(BATCH, tokens, WIDTH, dtype=torch.float64)
    grad = torch.randn(BATCH, readout_rows, WIDTH, dtype=torch.float64)

    def whole(x, parameters):
        return block(x, parameters, HEADS, EPS, *scales)[:, :readout_rows]

    def rows_alone(x, parameters):
        return readout_block(x, parameters, HEADS, readout_rows, EPS, *scales)

    y, gradients = output_and_gradients(rows_alone, x, parameters, grad)
    expected, expected_gradients = output_and_gradients(whole, x, parameters, grad)
    torch.testing.assert_close(y, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=lambda text, name=name: f"{name}: {text}")
    if "attn.qkv.bias" in gradients:
        key_bias = gradients["attn.qkv.bias"].chunk(3)[1]
        assert torch.equal(key_bias, torch.zeros_like(key_bias))


@pytest.mark.parametrize("readout_rows", [1, 2])
@pytest.mark.parametrize("layer_scale", [True, False])
def test_output_and_every_gradient_are_the_whole_blocks(readout_rows, layer_scale):
    assert_is_the_whole_block(block_parameters(layer_scale=layer_scale), readout_rows)


@pytest.mark.parametrize("readout_rows", [1, 2])
def test_drop_path_scales_each_branch_by_sample(readout_rows):
    scales = torch.tensor([[1.25, 0.0, 1.25], [0.0, 1.25, 1.25]], dtype=torch.float64)
    assert_is_the_whole_block(block_parameters(), readout_rows, scales=tuple(scales))


def test_absent_biases_and_norm_parameters():
    assert_is_the_whole_block(block_parameters(bias=False), 2)
    assert_is_the_whole_block(block_parameters(affine=False), 1)


def test_a_block_of_readout_rows_alone():
    assert_is_the_whole_block(block_parameters(), 1, tokens=1)
    assert_is_the_whole_block(block_parameters(), 2, tokens=2)


def test_the_key_bias_cancels():
    p = block_parameters()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    q, k, v = p["attn.qkv.weight"].chunk(3)
    q_bias, _, v_bias = p["attn.qkv.bias"].chunk(3)
    norm = p["norm1.weight"], p["norm1.bias"], EPS
    qkv = layer_norm_linear(x, *norm, p["attn.qkv.weight"], p["attn.qkv.bias"])
    whole, _ = attention(qkv.reshape(2, TOKENS, 3, HEADS, -1), 0.3)
    rows = readout_attention(x, *norm, q, q_bias, k, v, v_bias, HEADS, 0.3, 2)
    torch.testing.assert_close(rows, whole[:, :2])


def test_large_scores_do_not_overflow():
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    summed, log_sum_exp = readout(x, 1e4 * torch.ones(1, 1, 2, 16, dtype=torch.float64).cumsum(3), None, EPS)
    assert summed.isfinite().all()
    assert log_sum_exp.isfinite().all()
    assert log_sum_exp.abs().max() > 1e3
