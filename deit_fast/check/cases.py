"""What `deit-fast check` computes: every operator at a model's shapes, its inputs random but the same each time."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.operator import OPERATORS, BackwardOperator

# Narrow rows in batches that fill any GPU, where some operators take other kernels than for a few images.
DEIT_SIZES = tuple(
    Size.of_model(width, width // 64, 224, 16, 1000, batch) for width, batch in ((192, 128), (384, 64), (768, 8))
)
INTERPRETER_SIZES = (Size.of_model(64, 2, 32, 8, 10, batch=4),)
OPS = tuple(name for name, operator in OPERATORS.items() if not isinstance(operator, BackwardOperator))


@dataclass(frozen=True)
class CheckCase:
    """`function` of the named `arguments`; all floating ones have gradients, unless it is for inference only."""

    op: str
    title: str
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    arguments: dict[str, Any]
    inference: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """By name, those in lists as weights[0], weights[1]."""
        found: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            values = (
                {f"{name}[{i}]": each for i, each in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            found |= {label: each for label, each in values.items() if isinstance(each, Tensor)}
        return found

    @property
    def differentiable(self) -> list[str]:
        """Which of `tensors` get gradients."""
        if self.inference:
            return []
        data = OPERATORS[self.op].data
        return [
            label
            for label, tensor in self.tensors.items()
            if tensor.is_floating_point() and label.partition("[")[0] not in data
        ]

    def call(self, tensors: dict[str, Tensor]) -> Tensor | tuple[Tensor, ...]:
        """`function`, with these in place of `self.tensors`."""
        arguments = {}
        for name, value in self.arguments.items():
            if isinstance(value, list):
                arguments[name] = [tensors.get(f"{name}[{i}]", each) for i, each in enumerate(value)]
            else:
                arguments[name] = tensors.get(name, value)
        return self.function(**arguments)


def of_size(op: str, size: Size) -> str:
    """What of the size the cases of `op` depend on."""
    dims = f"{size.classes} classes" if op == "distillation_loss" else f"{size.tokens} tokens, width {size.width}"
    return f"batch {size.batch}, {dims}"


def cases(op: str, size: Size, dtype: torch.dtype, device: torch.device) -> Iterator[CheckCase]:
    """The cases of one operator, titled with what of the size they depend on."""
    new = Inputs(size, dtype, device)
    function = getattr(ops, op)
    for example in OPERATORS[op].examples(size, new):
        yield _case(op, size, example, function)
    for example, compound in _COMPOUND.get(op, lambda *_: ())(size, new):
        yield _case(op, size, example, compound)


def _case(op: str, size: Size, example: Example, function: Callable) -> CheckCase:
    title = ", ".join(filter(None, (example.title, of_size(op, size))))
    arguments = example.arguments
    if function is getattr(ops, op):
        # What an operator has besides, its function finds out itself.
        arguments = {name: arguments[name] for name in inspect.signature(function).parameters}
    return CheckCase(op, title, function, arguments, example.inference)


# What several operators make together ---------------------------------------------------------------------------------


def _and_the_residual(size: Size, new: Inputs) -> Iterator[tuple[Example, Callable]]:
    def branching(**arguments: Any) -> tuple[Tensor, ...]:
        projected, x = ops.layer_norm_linear_branching(**arguments)
        return *projected, x

    arguments = {"x": new.sequence(), **new.norm(), **new.projections(*[size.attended] * 3)}
    yield Example("and the residual", arguments), branching


def _kept_block(size: Size, new: Inputs) -> Iterator[tuple[Example, Callable]]:
    def block(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        drop_path_scale: Tensor,
        layer_scale: Tensor,
        **parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A block's two halves for the kept samples; what lies between is packed."""
        norm = (norm_weight, norm_bias, eps)
        kept = ops.keep_samples(drop_path_scale)
        (qkv,), x = ops.layer_norm_linear_branching(
            x, *norm, [parameters["qkv_weight"]], [parameters["qkv_bias"]], kept
        )
        out, _ = ops.attention([qkv.unflatten(-1, (3, size.heads, -1))], size.scale, kept)
        projection = parameters["proj_weight"], parameters["proj_bias"]
        x = ops.linear_residual(out, *projection, x, layer_scale, drop_path_scale, kept=kept)
        fc1 = parameters["fc1_weight"], parameters["fc1_bias"]
        fc2 = parameters["fc2_weight"], parameters["fc2_bias"]
        return kept, ops.mlp(x, *norm, *fc1, *fc2, layer_scale, drop_path_scale, kept=kept)

    (mlp,) = OPERATORS["mlp"].examples(size, new)
    arguments = {
        **{name: value for name, value in mlp.arguments.items() if name not in ("activation", "kept")},
        **new.linear(3 * size.attended, size.width, "qkv_"),
        **new.linear(size.width, size.attended, "proj_"),
    }
    yield Example("and a block of the kept ones", arguments), block


_COMPOUND: dict[str, Callable[[Size, Inputs], Iterator[tuple[Example, Callable]]]] = {
    "layer_norm_linear": _and_the_residual,
    "keep_samples": _kept_block,
}
