"""The transformer's MLP with timm's constructor and parameter names."""

from torch import Tensor, nn

from deit_fast.nn import functional, parts


def _pair(value) -> tuple:
    return value if isinstance(value, tuple) else (value, value)


class Mlp(nn.Module):
    """`fc2(act(fc1(x)))`; GELU (erf or tanh) is fused into the first GEMM, any other activation is called as given."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: type[nn.Module] = nn.GELU,
        norm_layer: type[nn.Module] | None = None,
        bias: bool | tuple[bool, bool] = True,
        drop: float | tuple[float, float] = 0.0,
        use_conv: bool = False,
        device=None,
        dtype=None,
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
        if functional.mlp_unfusable(self) is None:
            return functional.mlp_forward(self, x)
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


parts.MLPS.add(Mlp)
