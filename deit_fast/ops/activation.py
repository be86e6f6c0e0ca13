"""The activations that the operators know, by the name that their schemas use."""

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh")


def apply(name: str, x: Tensor) -> Tensor:
    if name == "none":
        return x
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def check(op: str, name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"deit_fast.{op}: activation must be one of {', '.join(ACTIVATIONS)}; got {name!r}")
