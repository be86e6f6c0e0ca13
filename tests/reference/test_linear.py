import pytest
import torch
from torch.nn import functional as F

from reference import layer_norm_linear, layer_norm_qkv, linear, linear_residual


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_and_without_gelu(bias):
    x, weight = randn(2, 5, 24), randn(40, 24)
    b = randn(40) if bias else None
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))
    torch.testing.assert_close(linear(x, weight, b, activation="gelu"), F.gelu(F.linear(x, weight, b)))
    tanh = F.gelu(F.linear(x, weight, b), approximate="tanh")
    torch.testing.assert_close(linear(x, weight, b, activation="gelu_tanh"), tanh)


def test_layer_norm_linear_and_qkv_project_the_normalised_rows():
    x, (norm_weight, norm_bias) = randn(2, 5, 24), randn(2, 24)
    weights, biases = randn(3, 24, 24), randn(3, 24)
    expected = F.linear(F.layer_norm(x, (24,), norm_weight, norm_bias, 1e-6), weights.flatten(0, 1), biases.flatten())

    packed = layer_norm_linear(x, norm_weight, norm_bias, 1e-6, weights.flatten(0, 1), biases.flatten())
    torch.testing.assert_close(packed, expected)

    interleaved = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
    separate = layer_norm_qkv(x, norm_weight, norm_bias, 1e-6, *interleaved)
    torch.testing.assert_close(torch.cat(separate, dim=-1), expected)


def test_linear_residual_scales_the_branch_and_not_the_residual():
    x, weight, bias, residual = randn(3, 5, 40), randn(24, 40), randn(24), randn(3, 5, 24)
    gamma, scale = randn(24), torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)
    branch = F.linear(x, weight, bias)
    torch.testing.assert_close(linear_residual(x, weight, bias, residual), residual + branch)
    torch.testing.assert_close(
        linear_residual(x, weight, bias, residual, gamma, scale),
        residual + scale.view(3, 1, 1) * (branch * gamma),
    )
