"""The whole MLP half of a block: LayerNorm, FC1, GELU, FC2, LayerScale, drop path, residual."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import mlp as kernels
from deit_fast.kernels.launching import hardware
from deit_fast.kernels.layer_norm import unsupported as no_norm
from deit_fast.ops import activations, backend, checks, drop_path
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flops import product_flops, rows_computed
from deit_fast.ops.layer_norm import stock_layer_norm
from deit_fast.ops.layer_norm_linear import check_projections, layer_norm_linear_backward, normalised_linear
from deit_fast.ops.linear import check_residual, linear_backward, residual_dtype, stock_linear, stock_residual
from deit_fast.ops.operator import Operator, distribute


class _Mlp(Operator):
    name = "mlp"
    launcher = staticmethod(kernels.mlp)
    casts = ("fc1_weight", "fc2_weight")
    saves = (
        "x", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale",
        "drop_path_scale", "kept",
    )  # fmt: skip
    data = ("drop_path_scale", "kept")
    own_backward = True

    @staticmethod
    def stock(
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        fc1_weight: Shared,
        fc1_bias: Shared | None,
        fc2_weight: Shared,
        fc2_bias: Shared | None,
        layer_scale: Shared | None,
        drop_path_scale: PerSample | None,
        activation: str,
        kept: Shared | None,
    ) -> Tensor:
        hidden = stock_linear(
            stock_layer_norm(drop_path.gather(x, kept, x.shape[0]), norm_weight, norm_bias, eps), fc1_weight, fc1_bias
        )
        hidden = activations.apply_(activation, hidden)
        branch = stock_linear(hidden, fc2_weight, fc2_bias)
        del hidden  # large, and the allocator can give it to the next
        return stock_residual(branch, x, layer_scale, drop_path_scale, kept)

    def check(self, a: Any) -> None:
        check_projections(self.name, a.x, a.norm_weight, a.norm_bias, [a.fc1_weight], [a.fc1_bias])
        checks.matrix(self.name, "fc2_weight", a.fc2_weight, a.fc1_weight.shape[0])
        checks.vector(self.name, "fc2_bias", a.fc2_bias, a.fc2_weight.shape[0])
        checks.same_device(self.name, a.x, fc2_weight=a.fc2_weight, fc2_bias=a.fc2_bias)
        shape = (*a.x.shape[:-1], a.fc2_weight.shape[0])
        check_residual(self.name, a.x, shape, a.layer_scale, a.drop_path_scale, a.kept)
        activations.check(self.name, a.activation)

    def unsupported(self, a: Any) -> str | None:
        parameters = (a.fc1_bias, a.fc2_weight, a.fc2_bias, a.layer_scale, a.drop_path_scale)
        products = checks.kernel_products(a.fc1_weight, a.x, a.norm_weight, a.norm_bias, *parameters)
        return no_norm(a.x.shape[-1]) or products

    def fake(self, a: Any) -> Tensor:
        return a.x.new_empty(a.x.shape, dtype=residual_dtype(a.x, a.fc2_weight, a.layer_scale))

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The hidden layer was not kept: it is computed once more, then the two halves' backwards run as ever."""
        (grad,) = grads
        of_fc1 = needs[:5]
        of_fc2 = [any(of_fc1), *needs[5:]]
        (hidden,) = normalised_linear.op(
            a.x,
            a.norm_weight,
            a.norm_bias,
            a.eps,
            [a.fc1_weight],
            [a.fc1_bias],
            a.kept,
            None if a.kept is None else drop_path.capacity(a.kept),
            "none",
        )
        found = linear_backward(
            grad, hidden, a.fc2_weight, a.fc2_bias, a.layer_scale, a.drop_path_scale, a.activation, a.kept, of_fc2
        )
        of_hidden, *gradients = distribute(found, of_fc2)
        if of_hidden is None:
            return *[None] * len(of_fc1), *gradients
        found = layer_norm_linear_backward(
            a.x, a.norm_weight, a.norm_bias, a.eps, [of_hidden], [a.fc1_weight], [a.fc1_bias], a.kept, grad, of_fc1
        )
        return *distribute(found, of_fc1), *gradients

    def flops(self, a: Any) -> int:
        rows = rows_computed(a.x, a.kept)
        return product_flops(rows, a.fc1_weight) + product_flops(rows, a.fc2_weight)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        arguments = {
            "x": new.sequence(),
            **new.norm(),
            **new.linear(size.hidden, size.width, "fc1_"),
            **new.linear(size.width, size.hidden, "fc2_"),
            **new.branch_scales(),
        }
        yield Example("", {**arguments, "activation": "gelu", "kept": None})


_mlp = _Mlp()


def mlp_fits(x: Tensor) -> bool:
    """Whether the MLP half of a block is best one kernel for rows like x's [..., D], on its device, without gradients.

    Its hidden layer then never reaches memory, which pays where rows are narrow and memory is slow.
    """
    width = x.shape[-1]
    return backend.use_triton(x) and width <= kernels.WIDEST and kernels.fits(width, _architecture(x.device))


@torch.compiler.assume_constant_result
def _architecture(device: torch.device) -> str:
    """Asked once for each graph, and not traced: no part of a driver belongs in it."""
    try:
        return hardware.architecture_of(device)
    except RuntimeError:  # fake tensors may be on a GPU that isn't there
        return ""


def mlp(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    activation: str = "gelu",
    kept: Tensor | None = None,
) -> Tensor:
    """`x + drop_path_scale * layer_scale * (act(LayerNorm(x) @ fc1.T + b1) @ fc2.T + b2)` with x [B, ..., D].

    fc1_weight [hidden, D], fc2_weight [D, hidden]. One kernel where that pays (`mlp_fits`), elsewhere LayerNorm and
    two products.
    With `kept` (`keep_samples`) only the kept samples are computed.
    """
    if x.dtype is not fc1_weight.dtype:
        checks.same_dtype("mlp", x, fc1_weight)
    return _mlp(
        x,
        norm_weight,
        norm_bias,
        eps,
        fc1_weight,
        fc1_bias,
        fc2_weight,
        fc2_bias,
        layer_scale,
        drop_path_scale,
        activation,
        kept,
    )
