"""LayerNorm and a linear layer after it, or three (q, k, v) of one shape: the start of either branch of a block."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import linear as kernels
from deit_fast.kernels.launching import hardware
from deit_fast.kernels.layer_norm import unsupported as no_norm
from deit_fast.ops import activations, checks, drop_path
from deit_fast.ops.arguments import FreeInt, PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flat import Layout
from deit_fast.ops.flops import product_flops, rows_computed
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.linear import check_linear, rows_of, stock_linear
from deit_fast.ops.operator import BackwardOperator, Operator, distribute, empty_gradients
from deit_fast.ops.product_dtype import as_dtype, product_dtype


def check_projections(
    op: str,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
) -> None:
    if len(weights) not in (1, 3) or len(biases) != len(weights):
        raise ValueError(
            f"deit_fast.{op}: weights must be one or three (q, k, v), with as many biases; got {len(weights)} weights "
            f"and {len(biases)} biases"
        )
    for weight, bias in zip(weights, biases, strict=True):
        check_linear(op, x, weight, bias)
        if weight.shape != weights[0].shape:
            raise ValueError(f"deit_fast.{op}: the weights of q, k and v must have one shape")
    checks.vector(op, "norm_weight", norm_weight, x.shape[-1])
    checks.vector(op, "norm_bias", norm_bias, x.shape[-1])
    checks.same_device(op, x, norm_weight=norm_weight, norm_bias=norm_bias)


class _LayerNormLinearBackward(BackwardOperator):
    name = "layer_norm_linear_backward"
    launcher = staticmethod(kernels.layer_norm_linear_backward)

    @staticmethod
    def stock(
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        grads: list[PerSample],
        weights: list[Shared],
        biases: list[Shared | None],
        kept: Shared | None,
        residual_grad: PerSample | None,
        needs: list[bool],
    ) -> list[Tensor]:
        """For one projection of LayerNorm(x) or three: their `grads`, `weights` and `biases`.

        `residual_grad`, of what went past them, is added to x's.
        """
        batch, x = x.shape[0], drop_path.gather(x, kept, grads[0].shape[0])
        need_norm, need_weights, need_biases = needs[:3], needs[3 : 3 + len(weights)], needs[3 + len(weights) :]
        dtype = product_dtype(weights[0])
        wide = torch.promote_types(dtype, torch.float32)
        parameters = [None if p is None else as_dtype(p, x.dtype) for p in (norm_weight, norm_bias)]
        normalised, mean, rstd = torch.ops.aten.native_layer_norm(x, [x.shape[-1]], *parameters, eps)
        grads = [rows_of(as_dtype(drop_path.filled(g, kept), dtype)) for g in grads]
        gradients = []
        if any(need_norm):
            of_norm = grads[0] @ as_dtype(weights[0], dtype)
            for grad, weight in zip(grads[1:], weights[1:], strict=True):
                of_norm += grad @ as_dtype(weight, dtype)
            of_norm = as_dtype(of_norm, x.dtype).view(x.shape)
            found = torch.ops.aten.native_layer_norm_backward(
                of_norm, x, [x.shape[-1]], mean, rstd, *parameters, need_norm
            )
            dx, *of_parameters = found
            if need_norm[0]:
                dx = drop_path.scatter(dx, kept, batch)
                gradients.append(dx if residual_grad is None else dx.add_(residual_grad))
            for gradient, need, like in zip(of_parameters, need_norm[1:], (norm_weight, norm_bias), strict=True):
                if need and like is not None:
                    gradients.append(as_dtype(gradient, like.dtype))
        if any(need_weights):
            normalised = rows_of(as_dtype(normalised, dtype))
            for grad, weight, need in zip(grads, weights, need_weights, strict=True):
                if need:
                    gradients.append(as_dtype(grad.T @ normalised, weight.dtype))
        for grad, bias, need in zip(grads, biases, need_biases, strict=True):
            if need and bias is not None:
                gradients.append(as_dtype(grad.sum(0, dtype=wide), bias.dtype))
        return gradients

    def unsupported(self, a: Any) -> str | None:
        return (
            _no_projections(a.weights)
            or no_norm(a.x.shape[-1])
            or checks.kernel_products(*a.weights, a.x, a.norm_weight, a.norm_bias, *a.grads, *a.biases, a.residual_grad)
        )

    def fake(self, a: Any) -> list[Tensor]:
        return empty_gradients((a.x, a.norm_weight, a.norm_bias, *a.weights, *a.biases), a.needs)

    def flops(self, a: Any) -> int:
        products = any(a.needs[:3]) * len(a.weights) + sum(a.needs[3 : 3 + len(a.weights)])
        return products * product_flops(rows_computed(a.x, a.kept), a.weights[0])


layer_norm_linear_backward = _LayerNormLinearBackward()


def _no_projections(weights: list[Tensor]) -> str | None:
    return hardware.no_separate_projections(weights[0]) if len(weights) > 1 else None


class _LayerNormLinear(Operator):
    name = "layer_norm_linear"
    launcher = staticmethod(kernels.layer_norm_linear)
    casts = ("weights",)
    saves = ("x", "norm_weight", "norm_bias", "weights", "biases", "kept")
    data = ("kept",)

    @staticmethod
    def stock(
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        weights: list[Shared],
        biases: list[Shared | None],
        kept: Shared | None,
        capacity: FreeInt | None,
        activation: str,
    ) -> list[Tensor]:
        x = drop_path.gather(x, kept, capacity)
        normalised = as_dtype(stock_layer_norm(x, norm_weight, norm_bias, eps), product_dtype(weights[0]))
        products = (stock_linear(normalised, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        found = [activations.apply_(activation, product) for product in products]
        if kept is None or capacity is None:
            return found
        return [drop_path.with_room(y, capacity) for y in found]

    def check(self, a: Any) -> None:
        check_projections(self.name, a.x, a.norm_weight, a.norm_bias, a.weights, a.biases)
        drop_path.check_kept(self.name, a.x, a.kept)
        drop_path.check_capacity(self.name, a.x, a.kept, a.capacity)
        activations.check(self.name, a.activation)

    def unsupported(self, a: Any) -> str | None:
        return (
            _no_projections(a.weights)
            or no_norm(a.x.shape[-1])
            or checks.kernel_products(*a.weights, a.x, a.norm_weight, a.norm_bias, *a.biases)
        )

    def fake(self, a: Any) -> list[Tensor]:
        leading = a.x.shape[:-1] if a.kept is None else (a.capacity, *a.x.shape[1:-1])
        return [a.x.new_empty((*leading, weight.shape[0]), dtype=weight.dtype) for weight in a.weights]

    def save(self, ctx: Any, layout: Layout, flat: tuple, outputs: tuple) -> None:
        *_, activation = flat
        if activation != "none":
            raise NotImplementedError(
                "deit_fast.layer_norm_linear: backward wants what goes into the activation: call ops.layer_norm_fc1"
            )
        super().save(ctx, layout, flat, outputs)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        *of_outputs, residual_grad = grads if len(grads) > len(a.weights) else (*grads, None)
        given = [grad for grad in of_outputs if grad is not None]
        if not given:
            return residual_grad, *[None] * (len(needs) - 1)
        if len(given) < len(of_outputs):
            of_outputs = [torch.zeros_like(given[0]) if grad is None else grad for grad in of_outputs]
        found = layer_norm_linear_backward(
            a.x, a.norm_weight, a.norm_bias, a.eps, of_outputs, a.weights, a.biases, a.kept, residual_grad, needs
        )
        return distribute(found, needs)

    def flops(self, a: Any) -> int:
        return sum(product_flops(rows_computed(a.x, a.kept), weight) for weight in a.weights)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        widths = {"QKV": [3 * size.attended], "separate q, k, v": [size.attended] * 3, "FC1": [size.hidden]}
        for title, outputs in widths.items():
            arguments = {"x": new.sequence(), **new.norm(), **new.projections(*outputs), "kept": None, "capacity": None}
            if title != "FC1":
                yield Example(title, {**arguments, "activation": "none"})
            else:
                yield Example("FC1 with GELU", {**arguments, "activation": "gelu"}, inference=True)


normalised_linear = _LayerNormLinear()


def layer_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kept: Tensor | None = None,
    capacity: int | None = None,
    activation: str = "none",
) -> Sequence[Tensor]:
    """`activation(LayerNorm(x) @ weight.T + bias)` for one projection or several of one shape.

    x [..., K], norm_weight and norm_bias [K], each of weights [N, K] and of biases [N] or None → as many [..., N] in
    the weights' dtype. With gradients, no activation: `layer_norm_fc1` gives what backward wants.

    With `kept` (`keep_samples`) for the kept samples of x [B, ...] alone: packed, with room for `capacity` samples
    (by default for all where the count must not be read).
    """
    if x.dtype is not weights[0].dtype:
        checks.same_dtype("layer_norm_linear", x, weights[0])
    if kept is not None and capacity is None:
        capacity = drop_path.capacity(kept)
    return normalised_linear(x, norm_weight, norm_bias, eps, weights, biases, kept, capacity, activation)


def layer_norm_linear_branching(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kept: Tensor | None = None,
    capacity: int | None = None,
) -> tuple[Sequence[Tensor], Tensor]:
    """`layer_norm_linear` at the start of a branch, and x for the residual that goes past it.

    The residual's gradient is added to the branch's as LayerNorm's backward writes that, in no pass of its own.
    """
    if x.dtype is not weights[0].dtype:
        checks.same_dtype("layer_norm_linear", x, weights[0])
    if kept is not None and capacity is None:
        capacity = drop_path.capacity(kept)
    return normalised_linear.branching(x, norm_weight, norm_bias, eps, weights, biases, kept, capacity, "none")
