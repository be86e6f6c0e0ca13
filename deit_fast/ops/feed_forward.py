"""The MLP half of a block as training computes it, in two operators.

FC1 writes what goes into the activation, which is kept for backward, and what comes out, which FC2 multiplies and
nobody keeps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deit_fast.kernels import linear as kernels
from deit_fast.kernels.layer_norm import unsupported as no_norm
from deit_fast.ops import activations, checks, drop_path
from deit_fast.ops.arguments import FreeInt, PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flops import product_flops, rows_computed
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.layer_norm_linear import check_projections, layer_norm_linear_backward
from deit_fast.ops.linear import (
    check_linear,
    check_residual,
    residual_dtype,
    residual_gradients,
    stock_linear,
    stock_residual,
)
from deit_fast.ops.operator import Operator, distribute
from deit_fast.ops.product_dtype import as_dtype, product_dtype


class _LayerNormFc1(Operator):
    name = "layer_norm_fc1"
    launcher = staticmethod(kernels.layer_norm_fc1)
    casts = ("weight",)
    saves = ("x", "norm_weight", "norm_bias", "weight", "bias", "kept")
    data = ("kept",)
    data_outputs = (1,)

    @staticmethod
    def stock(
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        weight: Shared,
        bias: Shared | None,
        activation: str,
        kept: Shared | None,
        capacity: FreeInt | None,
    ) -> tuple[Tensor, Tensor]:
        x = drop_path.gather(x, kept, capacity)
        normalised = as_dtype(stock_layer_norm(x, norm_weight, norm_bias, eps), product_dtype(weight))
        pre_activation = stock_linear(normalised, weight, bias)
        activated = activations.apply(activation, pre_activation)
        if kept is None or capacity is None:
            return pre_activation, activated
        return drop_path.with_room(pre_activation, capacity), drop_path.with_room(activated, capacity)

    def check(self, a: Any) -> None:
        check_projections(self.name, a.x, a.norm_weight, a.norm_bias, [a.weight], [a.bias])
        drop_path.check_kept(self.name, a.x, a.kept)
        drop_path.check_capacity(self.name, a.x, a.kept, a.capacity)
        _check_activation(self.name, a.activation)

    def unsupported(self, a: Any) -> str | None:
        return no_norm(a.x.shape[-1]) or checks.kernel_products(a.weight, a.x, a.norm_weight, a.norm_bias, a.bias)

    def fake(self, a: Any) -> tuple[Tensor, Tensor]:
        leading = a.x.shape[:-1] if a.kept is None else (a.capacity, *a.x.shape[1:-1])
        shape = (*leading, a.weight.shape[0])
        return a.x.new_empty(shape, dtype=a.weight.dtype), a.x.new_empty(shape, dtype=a.weight.dtype)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad, _, *of_residual = grads
        residual_grad = of_residual[0] if of_residual else None
        if grad is None:
            return residual_grad, *[None] * (len(needs) - 1)
        found = layer_norm_linear_backward(
            a.x, a.norm_weight, a.norm_bias, a.eps, [grad], [a.weight], [a.bias], a.kept, residual_grad, needs
        )
        return distribute(found, needs)

    def flops(self, a: Any) -> int:
        return product_flops(rows_computed(a.x, a.kept), a.weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        arguments = {"x": new.sequence(), **new.norm(), **new.linear(size.hidden, size.width)}
        yield Example("", {**arguments, "activation": "gelu", "kept": None, "capacity": None})


class _Fc2Residual(Operator):
    name = "fc2_residual"
    launcher = staticmethod(
        lambda pre_activation, activated, weight, bias, residual, layer_scale, drop_path_scale, activation, kept: (
            kernels.linear_residual(activated, weight, bias, residual, layer_scale, drop_path_scale, kept)
        )
    )
    casts = ("pre_activation", "activated", "weight")
    saves = ("pre_activation", "weight", "bias", "layer_scale", "drop_path_scale", "kept")
    data = ("activated", "drop_path_scale", "kept")

    @staticmethod
    def stock(
        pre_activation: PerSample,
        activated: PerSample,
        weight: Shared,
        bias: Shared | None,
        residual: PerSample,
        layer_scale: Shared | None,
        drop_path_scale: PerSample | None,
        activation: str,
        kept: Shared | None,
    ) -> Tensor:
        hidden = drop_path.filled(activated, kept)
        if _differentiable(pre_activation) and not _differentiable(activated):
            # An operator gave it, as data: the way to what went into the activation goes through here.
            hidden = activations.apply(activation, drop_path.filled(pre_activation, kept))
        branch = stock_linear(hidden, weight, bias)
        return stock_residual(branch, residual, layer_scale, drop_path_scale, kept)

    def check(self, a: Any) -> None:
        check_linear(self.name, a.pre_activation, a.weight, a.bias)
        if a.activated.shape != a.pre_activation.shape or a.activated.dtype != a.pre_activation.dtype:
            raise ValueError(
                f"deit_fast.{self.name}: activated must be like pre_activation, {a.pre_activation.dtype} "
                f"{tuple(a.pre_activation.shape)}, got {a.activated.dtype} {tuple(a.activated.shape)}"
            )
        shape = (*a.pre_activation.shape[:-1], a.weight.shape[0])
        check_residual(self.name, a.residual, shape, a.layer_scale, a.drop_path_scale, a.kept)
        checks.same_device(self.name, a.pre_activation, activated=a.activated, residual=a.residual)
        _check_activation(self.name, a.activation)

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_products(a.weight, a.activated, a.bias, a.residual, a.layer_scale, a.drop_path_scale)

    def fake(self, a: Any) -> Tensor:
        return a.residual.new_empty(a.residual.shape, dtype=residual_dtype(a.residual, a.weight, a.layer_scale))

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return residual_gradients(a, a.pre_activation, a.activation, grads, needs)

    def flops(self, a: Any) -> int:
        return product_flops(rows_computed(a.activated, a.kept), a.weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        pre_activation = new.normal(size.batch, size.tokens, size.hidden)
        arguments = {
            "pre_activation": pre_activation,
            "activated": activations.apply("gelu", pre_activation.detach()),
            **new.linear(size.width, size.hidden),
            "residual": new.sequence(),
            **new.branch_scales(),
        }
        yield Example("", {**arguments, "activation": "gelu", "kept": None})


def _differentiable(x: Tensor) -> bool:
    """Whether derivatives go through `x`, backward or forward."""
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def _check_activation(op: str, name: str) -> None:
    activations.check(op, name)
    if name == "none":
        raise ValueError(f"deit_fast.{op}: without an activation call layer_norm_linear and linear_residual")


normalised_fc1 = _LayerNormFc1()
residual_fc2 = _Fc2Residual()


def layer_norm_fc1(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = LayerNorm(x) @ weight.T + bias` and `activation(h)`, for `fc2_residual`.

    x [..., K], norm_weight and norm_bias [K], weight [N, K], bias [N] → twice [..., N] in the weight's dtype. The
    gradient is h's: `activation(h)` is data.

    With `kept` (`keep_samples`) for the kept samples of x [B, ...] alone: packed, with room for `capacity` samples
    (by default for all where the count must not be read).
    """
    return normalised_fc1(*_fc1_arguments(x, norm_weight, norm_bias, eps, weight, bias, activation, kept, capacity))


def layer_norm_fc1_branching(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Sequence[Tensor], Tensor]:
    """`layer_norm_fc1`, and x for the residual that goes past it, as `layer_norm_linear_branching` gives it."""
    arguments = _fc1_arguments(x, norm_weight, norm_bias, eps, weight, bias, activation, kept, capacity)
    return normalised_fc1.branching(*arguments)


def _fc1_arguments(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    kept: Tensor | None,
    capacity: int | None,
) -> tuple:
    if x.dtype is not weight.dtype:
        checks.same_dtype("layer_norm_fc1", x, weight)
    if kept is not None and capacity is None:
        capacity = drop_path.capacity(kept)
    return x, norm_weight, norm_bias, eps, weight, bias, activation, kept, capacity


def fc2_residual(
    pre_activation: Tensor,
    activated: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    activation: str = "gelu",
    kept: Tensor | None = None,
) -> Tensor:
    """`residual + drop_path_scale * layer_scale * (activated @ weight.T + bias)`, the end of `layer_norm_fc1`'s branch.

    pre_activation and activated [B, ..., K] as `layer_norm_fc1` gives them; the rest, and the result, as of
    `linear_residual`. Backward reads pre_activation, and its gradient is the one that there is: activated is data.
    """
    if activated.dtype is not weight.dtype:
        checks.same_dtype("fc2_residual", activated, weight)
    return residual_fc2(
        pre_activation, activated, weight, bias, residual, layer_scale, drop_path_scale, activation, kept
    )
