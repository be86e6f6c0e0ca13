"""The transformer's MLP with timm's constructor and parameter names."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.nn import guards, parts
from deit_fast.nn.forward import mlp_forward


def _pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


class Mlp(nn.Module):
    """`fc2(act(fc1(x)))` over x [..., in_features].

    GELU (erf or tanh) is fused into the first GEMM, any other activation is called as given.

    Raises:
        ValueError: a norm of the hidden layer, or convolutions in place of the linear layers.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: Callable[..., nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_layer is not None:
            raise ValueError("deit_fast.nn.Mlp does not compute a norm of the hidden layer; use timm's Mlp")
        if use_conv:
            raise ValueError("deit_fast.nn.Mlp takes tokens [..., width], not use_conv=True; use timm's Mlp")
        hidden_features = hidden_features or in_features
        bias, drop = _pair(bias), _pair(drop)
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias[0], device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop[0])
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias[1], device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop[1])

    def forward(self, x: Tensor) -> Tensor:
        if guards.mlp_unfusable(self) is None:
            return mlp_forward(self, x)
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


parts.add(parts.MLPS, Mlp)
