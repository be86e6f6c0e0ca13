"""Operator calls, boundary bytes and FLOPs of stock and swapped models, counted at the dispatcher.

    python -m evidence.traffic [--libraries timm,transformers,deit_fast] [--models tiny,small,base]
                            [--suites inference,training,drop-path] [--batch 32] [--json FILE]

A count on the CPU with the stock backend, whose operator boundaries are the kernels': no GPU is measured.
Every operator call that reaches the dispatcher counts, with the bytes of its distinct tensor inputs and
outputs. Free are views (all outputs alias inputs) and allocations. An expanded tensor counts its distinct
elements only. What an operator does inside is its own.

Bytes are a token's, in units of D (the width). Two senses:

- model: the whole model's inference, weights included, divided by its 12 blocks. Patch embedding, last norm
  and heads are spread over the blocks, and the weights over this batch's tokens.
- block: one block more (a model of two blocks less a model of one), weights left out: what a large batch
  tends to. The last block, of which a classifier reads the first rows alone, is in 'model' only.

Training is one forward and backward with drop path off. Its bytes grow in proportion to the batch, so they are
counted at batches of 1 and 2: the increment is a token's ('block'), the rest is weights and their gradients.
'Saved' is what autograd keeps for backward, an image's.

FLOPs are an image's, of the whole model: two a multiply-add of every matrix product, by torch's formulas and those of
`deit_fast.ops.flops`, and what backward computes again counts. '× stock' divides by stock's of the same run.

The drop path suite is a training step of timm's models with the drop paths of their published recipes, float32, the
mean over ten seeds. How it is counted stands in `evidence.recipes`.
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

from deit_fast.benchmark.flops import WithoutProducts, flop_counter
from deit_fast.benchmark.outputs import summed
from evidence.models import DEPTH, LIBRARIES, SIZES, TOKENS, build, choices, images
from evidence.recipes import RECIPES, SEEDS, work

PRECISIONS = ("bf16", "autocast-bf16")
SUITES = ("inference", "training", "drop-path")
# What an operator is given for its backward alone.
UNREAD = {"deit_fast::fc2_residual": "pre_activation"}
ALLOCATIONS = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"}


class TrafficCounter(TorchDispatchMode):
    """Counts the operator calls made under it, and the bytes at their boundaries.

    weights: storages whose bytes are counted as weights; copies of them (autocast's casts) are too.
    """

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        # The tensors are kept, lest an address be used again for something else.
        self._weights = {address(weight): weight for weight in weights}
        self.calls: Counter[str] = Counter()
        self.activation_bytes = 0
        self.weight_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = read(func, args, kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        name = func._schema.name
        if is_view(func, inputs, outputs) or name in ALLOCATIONS:
            return result
        self.calls[name] += 1
        if name == "aten::_to_copy" and address(inputs[0]) in self._weights:
            self._weights |= {address(output): output for output in outputs}
        self._add_distinct(inputs)
        self._add_distinct(outputs)
        return result

    def _add_distinct(self, tensors: list[Tensor]) -> None:
        for tensor in distinct(tensors):
            if address(tensor) in self._weights:
                self.weight_bytes += distinct_bytes(tensor)
            else:
                self.activation_bytes += distinct_bytes(tensor)


def read(func, args: tuple, kwargs: dict | None) -> list[Tensor]:
    """The tensors that an operator is given to read."""
    unread = UNREAD.get(func._schema.name)
    given = [arg for arg, argument in zip(args, func._schema.arguments, strict=False) if argument.name != unread]
    return [leaf for leaf in tree_leaves((given, kwargs)) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({(t.data_ptr(), t.shape, t.stride()): t for t in tensors}.values())


def is_view(func, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    # By storage, not by schema alone: `_unsafe_view` does not say that it is one.
    storages = {address(tensor) for tensor in inputs}
    return not func._schema.is_mutable and all(address(output) in storages for output in outputs)


def distinct_bytes(tensor: Tensor) -> int:
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


@dataclass(frozen=True)
class Traffic:
    """Bytes are a token and block, in units of D; flops an image's. operators: calls of one block by name.

    `weights_model` holds for the batch it was counted at: the weights' bytes are spread over its tokens.
    """

    calls_model: float
    calls_block: int
    activations_model: float
    weights_model: float
    activations_block: float
    flops: float
    operators: dict[str, int]

    @property
    def bytes_model(self) -> float:
        return self.activations_model + self.weights_model


def measure(make_model: Callable[[int], nn.Module], width: int, precision: str, batch: int) -> Traffic:
    """Traffic of one inference of the 12-block model, from counts of models with one block and with two.

    make_model: depth -> model in float32. precision: "bf16" (the whole model cast) or "autocast-bf16".
    """
    (one, flops_one), (two, flops_two) = (_count(make_model(depth), precision, batch) for depth in (1, 2))
    token_bytes = batch * TOKENS * width

    def whole(first: int, second: int) -> float:
        return (first + (DEPTH - 1) * (second - first)) / DEPTH

    return Traffic(
        calls_model=whole(one.calls.total(), two.calls.total()),
        calls_block=two.calls.total() - one.calls.total(),
        activations_model=whole(one.activation_bytes, two.activation_bytes) / token_bytes,
        weights_model=whole(one.weight_bytes, two.weight_bytes) / token_bytes,
        activations_block=(two.activation_bytes - one.activation_bytes) / token_bytes,
        flops=whole(flops_one, flops_two) * DEPTH / batch,
        operators=dict(two.calls - one.calls),
    )


def _count(model: nn.Module, precision: str, batch: int) -> tuple[TrafficCounter, int]:
    pure = precision == "bf16"
    dtype = torch.bfloat16 if pure else torch.float32
    model, pixels = model.to(dtype), images(batch, dtype)
    counter = TrafficCounter([*model.parameters(), *model.buffers()])
    autocast = nullcontext() if pure else torch.autocast("cpu", torch.bfloat16)
    with WithoutProducts(), torch.no_grad(), autocast, counter, flop_counter() as flops:
        model(pixels)
    return counter, flops.get_total_flops()


@dataclass(frozen=True)
class Training:
    """As Traffic, for forward and backward; saved_image in MiB."""

    calls_model: float
    calls_block: int
    bytes_model: float
    bytes_block: float
    saved_image: float
    flops: float
    operators: dict[str, int]


def measure_training(make_model: Callable[[int], nn.Module], width: int, precision: str, batch: int) -> Training:
    """Traffic of one training step of the 12-block model, at `batch`."""
    counts = {(depth, n): _count_training(make_model(depth), precision, n) for depth in (1, 2) for n in (1, 2)}
    byte_counts = {key: count.activation_bytes + count.weight_bytes for key, (count, _, _) in counts.items()}
    saved = {key: saved for key, (_, saved, _) in counts.items()}
    flops = {key: flops for key, (_, _, flops) in counts.items()}

    def whole(values: dict, n: int) -> float:
        return values[1, n] + (DEPTH - 1) * (values[2, n] - values[1, n])

    def an_image(values: dict) -> float:
        return whole(values, 2) - whole(values, 1)

    one, two = counts[1, 1][0].calls, counts[2, 1][0].calls
    block = [byte_counts[2, n] - byte_counts[1, n] for n in (1, 2)]
    at_batch = whole(byte_counts, 1) + (batch - 1) * an_image(byte_counts)
    return Training(
        calls_model=(one.total() + (DEPTH - 1) * (two.total() - one.total())) / DEPTH,
        calls_block=two.total() - one.total(),
        bytes_model=at_batch / DEPTH / (batch * TOKENS * width),
        bytes_block=(block[1] - block[0]) / (TOKENS * width),
        saved_image=an_image(saved) / 2**20,
        flops=an_image(flops),
        operators=dict(two - one),
    )


def _count_training(model: nn.Module, precision: str, batch: int) -> tuple[TrafficCounter, int, int]:
    pure = precision == "bf16"
    dtype = torch.bfloat16 if pure else torch.float32
    model, pixels = model.train().to(dtype), images(batch, dtype)
    weights = [*model.parameters(), *model.buffers()]
    known = {address(weight) for weight in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if address(tensor) not in known:
            kept[address(tensor)] = tensor
        return tensor

    counter = TrafficCounter(weights)
    autocast = nullcontext() if pure else torch.autocast("cpu", torch.bfloat16)
    with WithoutProducts(), counter, flop_counter() as flops:
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = summed(model(pixels))
        loss.backward()
    return counter, sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), flops.get_total_flops()


def maker(library: str, size: str, swapped: bool, memory: str = "balanced") -> Callable[[int], nn.Module]:
    """depth -> the model, stock or swapped."""

    def make(depth: int) -> nn.Module:
        model = build(library, size, depth)
        if swapped:
            import deit_fast

            deit_fast.swap(model, memory=memory)
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


def flops_columns(row: dict, table: list[dict]) -> str:
    """GFLOPs an image, and the ratio to stock's in the same table."""
    alike = ("library", "model", "precision")
    stock = [r for r in table if r["variant"] == "stock" and all(r[key] == row[key] for key in alike)]
    ratio = f"{row['flops'] / stock[0]['flops']:.3f}" if stock else ""
    return f"{row['flops'] / 1e9:.2f} | {ratio}"


def markdown(table: list[dict]) -> str:
    lines = [
        "| library | model | precision | | calls a block | calls, model | D bytes a block | D bytes, model "
        "| GFLOPs | × stock |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        lines.append(
            f"| {row['library']} | {row['model']} | {row['precision']} | {row['variant']} "
            f"| {row['calls_block']} | {row['calls_model']:.1f} "
            f"| {row['activations_block']:.1f} | {row['activations_model'] + row['weights_model']:.1f} "
            f"| {flops_columns(row, table)} |"
        )
    return "\n".join(lines)


def training_rows(libraries: list[str], sizes: list[str], batch: int) -> list[dict]:
    """As `rows`, for a training step; swapped models with either choice of memory."""
    from deit_fast.ops import backend

    table = []
    with backend.forced("torch"):
        for library in (name for name in libraries if name != "deit_fast"):
            for size in sizes:
                for precision in PRECISIONS:
                    for variant, options in (
                        ("stock", (False,)),
                        ("swapped", (True,)),
                        ("swapped, low", (True, "low")),
                    ):
                        training = measure_training(maker(library, size, *options), SIZES[size][0], precision, batch)
                        about = {"library": library, "model": size, "precision": precision}
                        table.append({**about, "variant": variant, "batch": batch, **asdict(training)})
    return table


def training_markdown(table: list[dict]) -> str:
    lines = [
        "| library | model | precision | | calls a block | calls, model | D bytes a block | D bytes, model "
        "| saved MiB | GFLOPs | × stock |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        lines.append(
            f"| {row['library']} | {row['model']} | {row['precision']} | {row['variant']} "
            f"| {row['calls_block']} | {row['calls_model']:.1f} "
            f"| {row['bytes_block']:.1f} | {row['bytes_model']:.1f} | {row['saved_image']:.1f} "
            f"| {flops_columns(row, table)} |"
        )
    return "\n".join(lines)


def drop_path_rows(batch: int) -> list[dict]:
    """Every recipe: the FLOPs of its training step, stock and swapped."""
    table = []
    for recipe in RECIPES.values():
        found = work(recipe, batch)
        table.append({**asdict(recipe), "drop_path": recipe.drop_path, "batch": batch, **asdict(found)})
    return table


def drop_path_markdown(table: list[dict]) -> str:
    lines = [
        "| timm model | drop path | branch samples kept | GFLOPs, stock | left out by readout | left out by drop path "
        "| computed | × stock | by seed |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in table:
        stock, swapped, seeds = row["stock"], row["without_drop_path"], row["with_drop_path"]
        mean = sum(seeds) / len(seeds)
        gflops = (flops / row["batch"] / 1e9 for flops in (stock, stock - swapped, swapped - mean, mean))
        lines.append(
            f"| {row['name']} | {row['drop_path']} | {row['kept']:.1%} "
            f"| {' | '.join(f'{value:.2f}' for value in gflops)} | {mean / stock:.3f} "
            f"| {min(seeds) / stock:.3f} to {max(seeds) / stock:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--libraries", default=",".join(LIBRARIES))
    parser.add_argument("--models", default=",".join(SIZES))
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write every figure to this file as well")
    arguments = parser.parse_args()
    if arguments.batch < 1:
        raise SystemExit(f"--batch must be at least 1, got {arguments.batch}")
    libraries = choices(arguments.libraries, LIBRARIES, "library")
    sizes = choices(arguments.models, SIZES, "model")

    suites = choices(arguments.suites, SUITES, "suite")

    print(
        f"224 pixels, batch {arguments.batch}, {TOKENS} tokens: counted on the CPU, not measured on a GPU.\n"
        f"'block': one block, weights left out. 'model': the whole model with its weights, divided by {DEPTH}."
    )
    found = {}
    if "inference" in suites:
        found["inference"] = rows(libraries, sizes, arguments.batch)
        print(f"\nInference\n\n{markdown(found['inference'])}")
    if "training" in suites:
        found["training"] = training_rows(libraries, sizes, arguments.batch)
        print(f"\nTraining step, drop path off\n\n{training_markdown(found['training'])}")
    if "drop-path" in suites:
        found["drop-path"] = drop_path_rows(arguments.batch)
        print(
            f"\nTraining step with the recipes' drop paths, swapped, mean of {SEEDS} seeds; GFLOPs an image\n"
            "(whole models, real masks; matrix products counted from their shapes and not computed)\n\n"
            f"{drop_path_markdown(found['drop-path'])}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
