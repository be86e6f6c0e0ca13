"""The MLP half of a pre-norm block, with its residual: LayerNorm, FC1, activation, FC2."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.ops.feed_forward import fc2_residual, layer_norm_fc1_branching, normalised_fc1, residual_fc2
from deit_fast.ops.half import Half, gradients_of, like
from deit_fast.ops.layer_norm_linear import layer_norm_linear
from deit_fast.ops.linear import linear_residual
from deit_fast.ops.mlp import mlp, mlp_fits


class MlpHalf(NamedTuple):
    """norm_weight, norm_bias [D]; fc1_weight [hidden, D], fc2_weight [D, hidden]; layer_scale [D].

    activation: "gelu" or "gelu_tanh". drop_path_scale [B], kept, capacity: a draw of drop path (`ops.keep_samples`).
    memory: "low" keeps nothing of what goes into the activation, and backward computes it again.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    activation: str
    layer_scale: Tensor | None
    drop_path_scale: Tensor | None
    kept: Tensor | None
    capacity: int | None
    memory: str


class _Mlp(Half):
    name = "mlp_half"
    matrices = ("fc1_weight", "fc2_weight")
    first = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias")

    def one_by_one(self, x: Tensor, a: MlpHalf) -> Tensor:
        """In two operators.

        In one without gradients where that is faster (`mlp_fits`), and with them where nothing is kept.
        """
        norm = a.norm_weight, a.norm_bias, a.eps
        fc1, fc2 = (a.fc1_weight, a.fc1_bias), (a.fc2_weight, a.fc2_bias)
        training = torch.is_grad_enabled()
        if a.memory == "low" if training else mlp_fits(x):
            return mlp(x, *norm, *fc1, *fc2, a.layer_scale, a.drop_path_scale, a.activation, a.kept)
        if training:
            (hidden, activated), x = layer_norm_fc1_branching(x, *norm, *fc1, a.activation, a.kept, a.capacity)
            return fc2_residual(hidden, activated, *fc2, x, a.layer_scale, a.drop_path_scale, a.activation, a.kept)
        (activated,) = layer_norm_linear(x, *norm, [a.fc1_weight], [a.fc1_bias], a.kept, a.capacity, a.activation)
        return linear_residual(activated, *fc2, x, a.layer_scale, a.drop_path_scale, a.kept)

    def forward(self, x: Tensor, a: MlpHalf) -> tuple[Tensor, ...]:
        pre_activation, activated = normalised_fc1(
            x, a.norm_weight, a.norm_bias, a.eps, a.fc1_weight, a.fc1_bias, a.activation, a.kept, a.capacity
        )
        y = residual_fc2(
            pre_activation, activated, a.fc2_weight, a.fc2_bias, x, a.layer_scale, a.drop_path_scale, a.activation,
            a.kept,
        )  # fmt: skip
        return y, pre_activation

    def backward(self, grad: Tensor, x: Tensor, a: MlpHalf, kept: Sequence[Tensor], needs: Sequence[bool]) -> tuple:
        (pre_activation,) = kept
        need_x, need = self.gathered(needs)
        fc2 = residual_fc2.Arguments(
            pre_activation, None, a.fc2_weight, a.fc2_bias, None, a.layer_scale, a.drop_path_scale, a.activation, a.kept
        )
        wanted = True, need.fc2_weight, need.fc2_bias, need_x, need.layer_scale
        dhidden, dfc2_weight, dfc2_bias, dx, dlayer_scale = residual_fc2.backward(fc2, (), (grad,), wanted)

        fc1 = normalised_fc1.Arguments(
            x, a.norm_weight, a.norm_bias, a.eps, a.fc1_weight, a.fc1_bias, a.activation, a.kept, None
        )
        wanted = need_x, need.norm_weight, need.norm_bias, need.fc1_weight, need.fc1_bias
        dx, dnorm_weight, dnorm_bias, dfc1_weight, dfc1_bias = normalised_fc1.backward(
            fc1, (), (dhidden, None, like(x, dx)), wanted
        )
        found = gradients_of(
            a,
            norm_weight=dnorm_weight,
            norm_bias=dnorm_bias,
            fc1_weight=dfc1_weight,
            fc1_bias=dfc1_bias,
            fc2_weight=dfc2_weight,
            fc2_bias=dfc2_bias,
            layer_scale=dlayer_scale,
        )
        return self.flat(dx, found)

    def gathered(self, flat: Sequence[Any]) -> tuple[Any, Any]:
        x, *rest = flat
        return x, MlpHalf(*rest)

    def has_one_dtype(self, x: Tensor, a: MlpHalf) -> bool:
        return x.dtype is a.fc1_weight.dtype is a.fc2_weight.dtype

    def chains(self, a: MlpHalf) -> bool:
        # With gradients it is one operator.
        return a.memory != "low" or not torch.is_grad_enabled()


mlp_half = _Mlp()
