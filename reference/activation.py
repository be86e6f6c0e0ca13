"""GELU (Hendrycks and Gimpel, arXiv 1606.08415) and its tanh approximation."""

import math

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x) = x/2 · (1 + erf(x / √2)), Φ the standard normal distribution function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))), section 2 of the paper."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation named `"none"`, `"gelu"` or `"gelu_tanh"`."""
    return {"none": lambda t: t, "gelu": gelu, "gelu_tanh": gelu_tanh}[activation](x)
