"""LayerNorm, and residual add + LayerNorm, over the last dimension (Ba et al. 2016, equation 4)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import layer_norm as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.operator import BackwardOperator, Operator, distribute, empty_gradients


def stock_layer_norm(x: PerSample, weight: Shared | None, bias: Shared | None, eps: float) -> Tensor:
    """`F.layer_norm` for parameters whose dtype may differ from the input's (autocast's fused operators)."""
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _check(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    checks.floating(op, "the input", x)
    checks.at_least_1d(op, "the input", x)
    checks.vector(op, "weight", weight, x.shape[-1])
    checks.vector(op, "bias", bias, x.shape[-1])
    checks.same_device(op, x, weight=weight, bias=bias)


class _LayerNormBackward(BackwardOperator):
    """`residual_grad`, of what went past the LayerNorm, is added to the input's gradient."""

    name = "layer_norm_backward"
    launcher = staticmethod(kernels.layer_norm_backward)

    @staticmethod
    def stock(
        grad: PerSample,
        x: PerSample,
        weight: Shared | None,
        bias: Shared | None,
        eps: float,
        residual_grad: PerSample | None,
        needs: list[bool],
    ) -> list[Tensor]:
        parameters = [None if p is None else p.to(x.dtype) for p in (weight, bias)]
        shape = [x.shape[-1]]
        _, mean, rstd = torch.ops.aten.native_layer_norm(x, shape, *parameters, eps)
        found = list(torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, *parameters, needs))
        if needs[0] and residual_grad is not None:
            found[0] = found[0] + residual_grad
        inputs = (x, weight, bias)
        return [g.to(i.dtype) for g, i, need in zip(found, inputs, needs, strict=True) if need and i is not None]

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_dtypes(a.grad, a.x, a.weight, a.bias)

    def fake(self, a: Any) -> list[Tensor]:
        return empty_gradients((a.x, a.weight, a.bias), a.needs)


class _LayerNorm(Operator):
    name = "layer_norm"
    stock = staticmethod(stock_layer_norm)
    launcher = staticmethod(kernels.layer_norm)
    casts, casts_to = ("x", "weight", "bias"), torch.float32
    saves = ("x", "weight", "bias")

    def check(self, a: Any) -> None:
        _check(self.name, a.x, a.weight, a.bias)

    def unsupported(self, a: Any) -> str | None:
        return kernels.unsupported(a.x.shape[-1]) or checks.kernel_dtypes(a.x, a.weight, a.bias)

    def fake(self, a: Any) -> Tensor:
        return torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        found = layer_norm_backward(grads[0], a.x, a.weight, a.bias, a.eps, None, needs)
        return distribute(found, needs)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        yield Example("", {"x": new.sequence(), **new.norm("")})


class _AddLayerNorm(Operator):
    name = "add_layer_norm"
    launcher = staticmethod(kernels.add_layer_norm)
    casts, casts_to = ("x", "residual", "weight", "bias"), torch.float32
    saves = ("weight", "bias")
    saves_outputs = (0,)

    @staticmethod
    def stock(
        x: PerSample, residual: PerSample, weight: Shared | None, bias: Shared | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = (x + residual).contiguous()
        return total, stock_layer_norm(total, weight, bias, eps)

    def check(self, a: Any) -> None:
        if a.x.shape != a.residual.shape:
            raise ValueError(
                f"deit_fast.add_layer_norm: x and residual must have one shape, got {tuple(a.x.shape)} and "
                f"{tuple(a.residual.shape)}"
            )
        checks.floating(self.name, "residual", a.residual)
        checks.same_device(self.name, a.x, residual=a.residual)
        _check(self.name, a.x, a.weight, a.bias)

    def unsupported(self, a: Any) -> str | None:
        return kernels.unsupported(a.x.shape[-1]) or checks.kernel_dtypes(a.x, a.residual, a.weight, a.bias)

    def fake(self, a: Any) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(a.x.dtype, a.residual.dtype)
        total = torch.empty(a.x.shape, dtype=dtype, device=a.x.device)
        return total, torch.empty_like(total)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        of_total, of_y = grads
        (total,) = outputs
        need_x, need_residual, *of_parameters = needs
        if of_y is None:
            return of_total, of_total, *(None if p is None else torch.zeros_like(p) for p in (a.weight, a.bias))
        wanted = [need_x or need_residual, *of_parameters]
        found = layer_norm_backward(of_y, total, a.weight, a.bias, a.eps, of_total, wanted)
        dx, dweight, dbias = distribute(found, wanted)
        return dx if need_x else None, dx if need_residual else None, dweight, dbias

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        yield Example("", {"x": new.sequence(), "residual": new.sequence(), **new.norm("")})


layer_norm_backward = _LayerNormBackward()
_layer_norm = _LayerNorm()
_add_layer_norm = _AddLayerNorm()


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm of `x` [..., D] over D: `(x - mean) / sqrt(var + eps) * weight + bias`, var biased.

    weight, bias: [D] or None. Statistics in float32; the result has the input's dtype, float32 under autocast.
    """
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """`(x + residual, LayerNorm(x + residual))` in one pass; shapes [..., D].

    The sum has the promoted dtype of the two; under autocast both results are float32.
    """
    return _add_layer_norm(x, residual, weight, bias, eps)
