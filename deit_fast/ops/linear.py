"""Linear layers, with the operations before and after them fused in.

Arithmetic runs in the weight's dtype. The input, the residual and the biases may be wider: that is what autocast
hands over (float32 stream, 16-bit weights).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import linear as kernels
from deit_fast.kernels.device import approximation
from deit_fast.ops import activations, checks, drop_path
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flat import Layout
from deit_fast.ops.flops import product_flops, rows_computed
from deit_fast.ops.operator import BackwardOperator, Operator, distribute, empty_gradients
from deit_fast.ops.product_dtype import as_dtype, product_dtype


def stock_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = product_dtype(weight)
    bias = None if bias is None else as_dtype(bias, dtype)
    return as_dtype(F.linear(as_dtype(x, dtype), as_dtype(weight, dtype), bias), weight.dtype)


def stock_residual(
    branch: Tensor,
    residual: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    kept: Tensor | None,
) -> Tensor:
    if layer_scale is not None:
        branch = branch * layer_scale
    if drop_path_scale is not None:
        factors = drop_path.gather(drop_path_scale, kept, branch.shape[0])
        branch = branch * factors.view(-1, *[1] * (branch.ndim - 1))
    if kept is None:
        # With gradients it would make a view of the result, whose hooks autograd drops where people add to it in place.
        in_place = branch.dtype is torch.promote_types(residual.dtype, branch.dtype) and not torch.is_grad_enabled()
        return branch.add_(residual) if in_place else (residual + branch).contiguous()
    dtype = torch.promote_types(residual.dtype, branch.dtype)
    stream = residual.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return stream.index_add_(0, kept[1 : 1 + branch.shape[0]], drop_path.filled(branch, kept).to(stream.dtype))


def residual_dtype(residual: Tensor, weight: Tensor, layer_scale: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(residual.dtype, weight.dtype)
    return dtype if layer_scale is None else torch.promote_types(dtype, layer_scale.dtype)


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.floating(op, "the input", x)
    checks.at_least_1d(op, "the input", x)
    checks.matrix(op, "weight", weight, x.shape[-1])
    checks.vector(op, "bias", bias, weight.shape[0])
    checks.same_device(op, x, weight=weight, bias=bias)


def check_residual(
    op: str,
    residual: Tensor,
    shape: tuple,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    kept: Tensor | None,
) -> None:
    if kept is not None:
        drop_path.check_kept(op, residual, kept)
        shape = (residual.shape[0], *shape[1:])
    if residual.shape != shape:
        raise ValueError(
            f"deit_fast.{op}: residual must have the output's shape {tuple(shape)}, got {tuple(residual.shape)}"
        )
    checks.vector(op, "layer_scale", layer_scale, shape[-1])
    checks.vector(op, "drop_path_scale", drop_path_scale, shape[0])
    checks.same_device(op, residual, layer_scale=layer_scale, drop_path_scale=drop_path_scale)


def rows_of(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(0, x.shape[-1])


class _LinearBackward(BackwardOperator):
    name = "linear_backward"
    launcher = staticmethod(kernels.linear_backward)

    @staticmethod
    def stock(
        grad: PerSample,
        x: PerSample,
        weight: Shared,
        bias: Shared | None,
        layer_scale: Shared | None,
        drop_path_scale: PerSample | None,
        input_activation: str,
        kept: Shared | None,
        needs: list[bool],
    ) -> list[Tensor]:
        """LayerScale goes into weight-sized tensors, never into a pass over the tokens:

        with g = drop_path_scale * grad and G = gᵀ act(x), the gradients are dx = g (layer_scale W) act'(x),
        dW = layer_scale G, db = layer_scale Σg, dlayer_scale = Σ_k W G + b Σg.
        """
        need_x, need_weight, need_bias, need_layer_scale = needs
        dtype = product_dtype(weight)
        narrow = layer_scale is not None and weight.dtype is torch.float16
        if narrow:
            dtype = torch.float32  # of float16's range layer_scale W may fall short, and G leave it
        capacity, x = x.shape[0], drop_path.filled(x, kept)
        grad = drop_path.gather(grad, kept, capacity)
        if drop_path_scale is not None:
            grad = grad * drop_path.gather(drop_path_scale, kept, capacity).view(-1, *[1] * (grad.ndim - 1))
        grad = rows_of(as_dtype(grad, dtype))
        gradients = []
        if need_x:
            scaled = weight.float() if narrow else weight
            if layer_scale is not None:
                scaled = scaled * layer_scale.unsqueeze(1)
            dx = as_dtype(grad @ as_dtype(scaled, dtype), x.dtype).view(x.shape)
            if input_activation != "none":
                dx = torch.ops.aten.gelu_backward(dx, x, approximate=approximation(input_activation))
            gradients.append(drop_path.with_room(dx, capacity))
        if need_weight or need_layer_scale:
            product = grad.T @ rows_of(as_dtype(activations.apply(input_activation, x), dtype))
        if need_bias or need_layer_scale:
            total = grad.sum(0, dtype=torch.promote_types(dtype, torch.float32))
        if need_weight:
            scaled = product if layer_scale is None else product * layer_scale.unsqueeze(1)
            gradients.append(as_dtype(scaled, weight.dtype))
        if need_bias and bias is not None:
            gradients.append(as_dtype(total if layer_scale is None else total * layer_scale, bias.dtype))
        if need_layer_scale and layer_scale is not None:
            wide = total.dtype
            of_scale = (weight.to(wide) * product.to(wide)).sum(1)
            if bias is not None:
                of_scale += bias * total
            gradients.append(of_scale.to(layer_scale.dtype))
        return gradients

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_products(a.weight, a.grad, a.x, a.bias, a.layer_scale, a.drop_path_scale)

    def fake(self, a: Any) -> list[Tensor]:
        return empty_gradients((a.x, a.weight, a.bias, a.layer_scale), a.needs)

    def flops(self, a: Any) -> int:
        need_x, need_weight, _, need_layer_scale = a.needs
        return (need_x + (need_weight or need_layer_scale)) * product_flops(rows_computed(a.x, a.kept), a.weight)


linear_backward = _LinearBackward()


class _Linear(Operator):
    name = "linear"
    launcher = staticmethod(kernels.linear)
    casts = ("x", "weight")
    saves = ("x", "weight", "bias")

    @staticmethod
    def stock(x: PerSample, weight: Shared, bias: Shared | None, activation: str) -> Tensor:
        return activations.apply_(activation, stock_linear(x, weight, bias))

    def check(self, a: Any) -> None:
        check_linear(self.name, a.x, a.weight, a.bias)
        activations.check(self.name, a.activation)

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_products(a.weight, a.x, a.bias)

    def fake(self, a: Any) -> Tensor:
        return a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0]), dtype=a.weight.dtype)

    def save(self, ctx: Any, layout: Layout, flat: tuple, outputs: tuple) -> None:
        *_, activation = flat
        if activation != "none":
            raise NotImplementedError("deit_fast.linear: backward wants what goes into the activation: call ops.linear")
        super().save(ctx, layout, flat, outputs)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        found = linear_backward(grads[0], a.x, a.weight, a.bias, None, None, "none", None, [*needs, False])
        return distribute(found, needs)

    def flops(self, a: Any) -> int:
        return product_flops(rows_computed(a.x), a.weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        arguments = {"x": new.sequence(), **new.linear(size.hidden, size.width)}
        yield Example("", {**arguments, "activation": "none"})
        yield Example("with GELU", {**arguments, "activation": "gelu"}, inference=True)


_linear = _Linear()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """`activation(x @ weight.T + bias)`: x [..., K], weight [N, K], bias [N] → [..., N].

    activation: "none", "gelu" (erf) or "gelu_tanh".
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("linear", x, weight)
    if activation != "none" and torch.is_grad_enabled():
        # Backward wants the pre-activation, which the fused epilogue never writes.
        activations.check("linear", activation)
        return activations.apply(activation, _linear(x, weight, bias, "none"))
    return _linear(x, weight, bias, activation)


def residual_gradients(
    a: Any, x: Tensor, activation: str, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> Sequence[Tensor | None]:
    """Of x, which `activation` is applied to, weight, bias, residual and layer_scale, at the end of a branch."""
    (grad,) = grads
    need_x, need_weight, need_bias, need_residual, need_layer_scale = needs
    wanted = [need_x, need_weight, need_bias, need_layer_scale]
    found = linear_backward(grad, x, a.weight, a.bias, a.layer_scale, a.drop_path_scale, activation, a.kept, wanted)
    dx, dweight, dbias, dlayer_scale = distribute(found, wanted)
    return dx, dweight, dbias, grad if need_residual else None, dlayer_scale


class _LinearResidual(Operator):
    name = "linear_residual"
    launcher = staticmethod(kernels.linear_residual)
    casts = ("x", "weight")
    saves = ("x", "weight", "bias", "layer_scale", "drop_path_scale", "kept")
    data = ("drop_path_scale", "kept")

    @staticmethod
    def stock(
        x: PerSample,
        weight: Shared,
        bias: Shared | None,
        residual: PerSample,
        layer_scale: Shared | None,
        drop_path_scale: PerSample | None,
        kept: Shared | None,
    ) -> Tensor:
        branch = stock_linear(drop_path.filled(x, kept), weight, bias)
        return stock_residual(branch, residual, layer_scale, drop_path_scale, kept)

    def check(self, a: Any) -> None:
        check_linear(self.name, a.x, a.weight, a.bias)
        shape = (*a.x.shape[:-1], a.weight.shape[0])
        check_residual(self.name, a.residual, shape, a.layer_scale, a.drop_path_scale, a.kept)
        checks.same_device(self.name, a.x, residual=a.residual)

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_products(a.weight, a.x, a.bias, a.residual, a.layer_scale, a.drop_path_scale)

    def fake(self, a: Any) -> Tensor:
        return a.residual.new_empty(a.residual.shape, dtype=residual_dtype(a.residual, a.weight, a.layer_scale))

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return residual_gradients(a, a.x, "none", grads, needs)

    def flops(self, a: Any) -> int:
        return product_flops(rows_computed(a.x, a.kept), a.weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        for title, inputs, inference in (("projection", size.attended, False), ("FC2", size.hidden, True)):
            arguments = {
                "x": new.normal(size.batch, size.tokens, inputs),
                **new.linear(size.width, inputs),
                "residual": new.sequence(),
                **new.branch_scales(),
                "kept": None,
            }
            yield Example(title, arguments, inference)


residual_linear = _LinearResidual()


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`residual + drop_path_scale * layer_scale * (x @ weight.T + bias)`.

    x [B, ..., K], weight [N, K], bias and layer_scale [N], residual [B, ..., N], drop_path_scale [B]: one factor
    a sample, taken as data (it has no gradient). The result has the promoted dtype of residual, weight and layer_scale.

    With `kept` (`keep_samples`) x is packed; the dropped samples of the residual are copied.
    """
    if x.dtype is not weight.dtype:
        checks.same_dtype("linear_residual", x, weight)
    return residual_linear(x, weight, bias, residual, layer_scale, drop_path_scale, kept)
