"""What is done in the first minutes, in its order: the most valuable first."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from deit_fast.benchmark.gpu import behaviour, compiling, contact, launches, models, tuning
from deit_fast.benchmark.gpu.blocks import Shape, launch_block
from deit_fast.benchmark.gpu.bounds import furthest_from_bound, worst_launches
from deit_fast.benchmark.gpu.compiling import Recipe
from deit_fast.benchmark.gpu.record import Record
from deit_fast.benchmark.workers import Tell
from deit_fast.cli.check_cases import DEIT_SIZES, OPS, Size, of_size
from deit_fast.models.config import DeiTConfig
from deit_fast.models.registry import get_config

# What a block of DeiT-S or -B, its embedding and its last rows run.
NEEDED = ("layer_norm_linear", "attention", "linear_residual", "mlp", "patch_embed", "readout_attention", "layer_norm")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A smaller GPU gets smaller batches.
_LARGE_MEMORY = 60 * 2**30


@dataclass(frozen=True)
class Scope:
    """How large what is run is. sizes: of `check`; widths: of blocks; models: by name."""

    sizes: tuple[Size, ...]
    widths: tuple[int, ...]
    models: dict[str, DeiTConfig]
    tokens: int
    batch: int


def scope(memory: int) -> Scope:
    """For a GPU with as many bytes of memory. DeiT-S and -B come before -Ti."""
    tiny, small, base = DEIT_SIZES
    names = {size: f"deit_{size}_distilled_patch16_224" for size in ("small", "base", "tiny")}
    return Scope(
        (small, base, tiny),
        (384, 768, 192),
        {size: get_config(name) for size, name in names.items()},
        small.tokens,
        256 if memory >= _LARGE_MEMORY else 64,
    )


@dataclass(frozen=True)
class Task:
    """`function(*arguments)`, in a worker; its result is JSON."""

    step: str
    name: str
    function: Callable[..., Any]
    arguments: tuple


def perform(task: Task, tell: Tell) -> object:
    return task.function(*task.arguments)


@dataclass(frozen=True)
class Step:
    """seconds: that one of its tasks may take. tasks: of the scope, the device, and what was found before."""

    name: str
    seconds: float
    tasks: Callable[[Scope, torch.device, Record], list[Task]]


def _contact(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [
        Task("contact", "environment", contact.environment, (device,)),
        Task("contact", "one operator", contact.one_operator, (device, what.sizes[0])),
        Task("contact", "plans", contact.plans, (device, what.sizes[0])),
        Task("contact", "peaks", contact.measured_peaks, (device,)),
    ]


def _compile(what: Scope, device: torch.device, record: Record) -> list[Task]:
    recipes = [
        *(Recipe(contact.launch_cases, (op, size, dtype)) for op, size, dtype in _checked(what)),
        *(Recipe(launch_block, (shape,)) for shape in (*_shapes(what), *_small(what))),
        *(
            Recipe(models.launch_model, (config, what.batch, training))
            for config, training in product(what.models.values(), (False, True))
        ),
    ]
    return [Task("compile", "all kernels", compiling.compile_all, (device, tuple(recipes)))]


def _check(what: Scope, device: torch.device, record: Record) -> list[Task]:
    operators = [
        Task(
            "check",
            f"{op}, {of_size(op, size)}, {str(dtype).removeprefix('torch.')}",
            contact.checked,
            (op, size, dtype, device),
        )
        for op, size, dtype in _checked(what)
    ]
    small, scaled = _small(what)
    around = [
        Task("check", f"{function.__name__.replace('_', ' ')}, {small.title}", function, (device, small))
        for function in (
            behaviour.repeated_from_plans,
            behaviour.repeated,
            behaviour.in_a_graph,
            behaviour.on_a_side_stream,
        )
    ]
    around.append(Task("check", f"scaled autocast, {scaled.title}", behaviour.scaled_autocast, (device, scaled)))
    first = len(NEEDED) * len(what.sizes)
    return [*operators[:first], *around, *operators[first:]]


def _checked(what: Scope) -> list[tuple[str, Size, torch.dtype]]:
    """Operators, sizes and dtypes, what DeiT-S and -B need in bfloat16 first."""
    rest = tuple(op for op in OPS if op not in NEEDED)
    return [
        (op, size, dtype)
        for dtype in _DTYPES
        for ops in (NEEDED, rest)
        for size in what.sizes
        for op in ops
    ]  # fmt: skip


def _shapes(what: Scope) -> list[Shape]:
    return [
        Shape(width, what.batch, what.tokens, training=training) for width in what.widths for training in (False, True)
    ]


def _small(what: Scope) -> tuple[Shape, Shape]:
    """A block in bfloat16 and one of float32 weights, for what is not timed."""
    small = Shape(what.widths[0], min(8, what.batch), what.tokens, training=True)
    return small, replace(small, dtype=torch.float32)


def _list_operators(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [Task("operators", shape.title, launches.listed, (device, shape)) for shape in _shapes(what)]


def _time_operators(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [
        Task("launches", f"{shape.title}, {place}: {name}", launches.operator_times, (device, shape, place))
        for shape in _shapes(what)
        for place, name in enumerate(record.result("operators", shape.title) or ())
    ]


def _time_models(what: Scope, device: torch.device, record: Record) -> list[Task]:
    """Models before blocks; all eager ones first, since compiling takes most of a minute each."""

    def model(name: str, config: DeiTConfig, training: bool, contender: str) -> Task:
        title = f"DeiT-{name}, batch {what.batch}, {'training' if training else 'inference'}, {contender}"
        return Task("models", title, models.model_time, (device, config, what.batch, training, contender))

    def block(shape: Shape, contender: str) -> Task:
        return Task("models", f"block, {shape.title}, {contender}", models.block_time, (device, shape, contender))

    found = []
    for contenders in (models.EAGER, models.COMPILED):
        for (name, config), training in product(what.models.items(), (False, True)):
            found += [model(name, config, training, contender) for contender in contenders]
        found += [block(shape, contender) for shape in _shapes(what) for contender in contenders]
    return found


def _tune(what: Scope, device: torch.device, record: Record) -> list[Task]:
    """The operators furthest from their bound first; then where a step's time goes, and the worst launches alone."""
    timed = {
        f"{shape.title}, {place}: {name}": (shape, place)
        for shape in _shapes(what)
        for place, name in enumerate(record.result("operators", shape.title) or ())
    }
    slowest = [name for name in furthest_from_bound(record) if name in timed]
    tuning_tasks = [Task("tuning", name, tuning.tune_operator, (device, *timed[name])) for name in slowest]
    name, config = next(iter(what.models.items()))
    profiles = [
        Task(
            "tuning",
            f"profile of DeiT-{name}, batch {what.batch}, {'training' if training else 'inference'}",
            tuning.profiled_model,
            (device, config, what.batch, training),
        )
        for training in (False, True)
    ]
    worst = [
        Task("tuning", f"ncu: {kernel} in {name}", tuning.nsight, (device, timed[name][0], kernel))
        for name, kernel in worst_launches(record)[:3]
        if name in timed
    ]
    return [*profiles, *worst, *tuning_tasks]


STEPS = (
    Step("contact", 60, _contact),
    Step("compile", 240, _compile),
    Step("check", 60, _check),
    Step("operators", 60, _list_operators),
    Step("launches", 60, _time_operators),
    Step("models", 90, _time_models),
    Step("tuning", 150, _tune),
)
