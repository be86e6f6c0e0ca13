"""Operator calls and boundary bytes a transformer block, stock and swapped, counted at the dispatcher.

    python -m bench.traffic [--libraries timm,transformers,deit_fast] [--models tiny,small,base]
                            [--batch 32] [--json FILE]

A count on the CPU with the stock backend, whose operator boundaries are the kernels': no GPU is measured.
Every operator call that reaches the dispatcher counts, with the bytes of its distinct tensor inputs and
outputs. Free are views (all outputs alias inputs) and allocations. An expanded tensor counts its distinct
elements only. What an operator does inside is its own.

Bytes are a token's, in units of D (the width). Two senses:

- model: the whole model's inference, weights included, divided by its 12 blocks. Patch embedding, last norm
  and heads are spread over the blocks, and the weights over this batch's tokens.
- block: one block more (a model of two blocks less a model of one), weights left out: what a large batch
  tends to.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.models import DEPTH, LIBRARIES, SIZES, TOKENS, build, choices, images

PRECISIONS = ("bf16", "autocast-bf16")
_ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class TrafficCounter(TorchDispatchMode):
    """Counts the operator calls made under it, and the bytes at their boundaries.

    weights: storages whose bytes are counted as weights; copies of them (autocast's casts) are too.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        # The tensors are kept, lest an address be used again for something else.
        self._weights = {_address(weight): weight for weight in weights}
        self.calls: Counter[str] = Counter()
        self.activation_bytes = 0
        self.weight_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func._schema.name
        if _is_view(func, inputs, outputs) or name in _ALLOCATIONS:
            return result
        self.calls[name] += 1
        if name == "aten::_to_copy" and _address(inputs[0]) in self._weights:
            self._weights |= {_address(output): output for output in outputs}
        self._add_distinct(inputs)
        self._add_distinct(outputs)
        return result

    def _add_distinct(self, tensors: list[Tensor]) -> None:
        distinct = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
        for tensor in distinct.values():
            if _address(tensor) in self._weights:
                self.weight_bytes += _distinct_bytes(tensor)
            else:
                self.activation_bytes += _distinct_bytes(tensor)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_view(func, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    # By storage, not by schema alone: `_unsafe_view` does not say that it is one.
    storages = {_address(tensor) for tensor in inputs}
    return not func._schema.is_mutable and all(_address(output) in storages for output in outputs)


def _distinct_bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


@dataclass(frozen=True)
class Traffic:
    """Bytes are a token and block, in units of D. operators: calls of one block by name.

    `weights_model` holds for the batch it was counted at: the weights' bytes are spread over its tokens.
    """

    calls_model: float
    calls_block: int
    activations_model: float
    weights_model: float
    activations_block: float
    operators: dict[str, int]

    @property
    def bytes_model(self) -> float:
        return self.activations_model + self.weights_model


def measure(make_model: Callable[[int], nn.Module], width: int, precision: str, batch: int) -> Traffic:
    """Traffic of one inference of the 12-block model, from counts of models with one block and with two.

    make_model: depth -> model in float32. precision: "bf16" (the whole model cast) or "autocast-bf16".
    """
    one, two = (_count(make_model(depth), precision, batch) for depth in (1, 2))
    token_bytes = batch * TOKENS * width

    def whole(first: int, second: int) -> float:
        return (first + (DEPTH - 1) * (second - first)) / DEPTH

    return Traffic(
        calls_model=whole(one.calls.total(), two.calls.total()),
        calls_block=two.calls.total() - one.calls.total(),
        activations_model=whole(one.activation_bytes, two.activation_bytes) / token_bytes,
        weights_model=whole(one.weight_bytes, two.weight_bytes) / token_bytes,
        activations_block=(two.activation_bytes - one.activation_bytes) / token_bytes,
        operators=dict(two.calls - one.calls),
    )


def _count(model: nn.Module, precision: str, batch: int) -> TrafficCounter:
    pure = precision == "bf16"
    dtype = torch.bfloat16 if pure else torch.float32
    model, pixels = model.to(dtype), images(batch, dtype)
    counter = TrafficCounter([*model.parameters(), *model.buffers()])
    autocast = nullcontext() if pure else torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad(), autocast, counter:
        model(pixels)
    return counter


def maker(library: str, size: str, swapped: bool) -> Callable[[int], nn.Module]:
    """depth -> the model, stock or swapped."""

    def make(depth: int) -> nn.Module:
        model = build(library, size, depth)
        if swapped:
            import deit_fast

            deit_fast.swap(model)
        return model

    return make


def rows(libraries: list[str], sizes: list[str], batch: int) -> list[dict]:
    """Every model in both precisions, stock and ours in turn."""
    from deit_fast.ops import backend

    table = []
    with backend.forced("torch"):
        for library in libraries:
            for size in sizes:
                for precision in PRECISIONS:
                    # deit_fast's own model is born of fused modules: there is no stock one.
                    variants = {"ours": False} if library == "deit_fast" else {"stock": False, "swapped": True}
                    for variant, swapped in variants.items():
                        model = maker(library, size, swapped)
                        traffic = measure(model, SIZES[size][0], precision, batch)
                        about = {"library": library, "model": size, "precision": precision}
                        table.append({**about, "variant": variant, "batch": batch, **asdict(traffic)})
    return table


def markdown(table: list[dict]) -> str:
    lines = [
        "| library | model | precision | | calls a block | calls, model | D bytes a block | D bytes, model |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in table:
        lines.append(
            f"| {row['library']} | {row['model']} | {row['precision']} | {row['variant']} "
            f"| {row['calls_block']} | {row['calls_model']:.1f} "
            f"| {row['activations_block']:.1f} | {row['activations_model'] + row['weights_model']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write every figure to this file as well")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise SystemExit(f"--batch must be at least 1, got {arguments.batch}")
    libraries = choices(arguments.libraries, LIBRARIES, "library")
    sizes = choices(arguments.models, SIZES, "model")

    table = rows(libraries, sizes, arguments.batch)
    print(
        f"Inference at 224 pixels, batch {arguments.batch}, {TOKENS} tokens: counted on the CPU, not\n"
        f"measured on a GPU. 'block': one block, weights left out. 'model': the whole model with its\n"
        f"weights, divided by {DEPTH}.\n"
    )
    print(markdown(table))
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
