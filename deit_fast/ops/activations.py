"""The activations that the operators know, by the name that their schemas use."""

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels.device import approximation

ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def apply(name: str, x: Tensor) -> Tensor:
    if name == "none":
        return x
    return F.gelu(x, approximate=approximation(name))


def apply_(name: str, x: Tensor) -> Tensor:
    """`apply` to what nobody else holds: in place where backward does not want it."""
    if name == "none" or x.requires_grad:
        return apply(name, x)
    return torch.ops.aten.gelu_.default(x, approximate=approximation(name))


def check(op: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"deit_fast.{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
