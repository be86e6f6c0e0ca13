"""What is done in the first minutes, in its order: the most valuable first."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from deit_fast.benchmark.gpu import behaviour, compiling, contact, launches, models, tuning
from deit_fast.benchmark.gpu.blocks import Shape, launch_block
from deit_fast.benchmark.gpu.bounds import furthest_from_bound, worst_launches
from deit_fast.benchmark.gpu.compiling import LaunchRecipe
from deit_fast.benchmark.gpu.record import Record
from deit_fast.check.cases import DEIT_SIZES, OPS, Size, of_size
from deit_fast.check.workers import Tell, make_current
from deit_fast.models.config import DeiTConfig
from deit_fast.models.registry import get_config

# What a block of DeiT-S or -B, its embedding and its last rows run.
NEEDED = (
    "layer_norm_linear", "attention", "linear_residual", "layer_norm_fc1", "fc2_residual", "patch_embed",
    "readout_attention", "layer_norm",
)  # fmt: skip
_TUNED_FIRST = 6
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
    """`function(device, *arguments)`, in a worker; its result is JSON."""

    step: str
    name: str
    device: torch.device
    function: Callable[..., Any]
    arguments: tuple = ()


def perform(task: Task, tell: Tell) -> object:
    make_current(task.device)
    return task.function(task.device, *task.arguments)


@dataclass(frozen=True)
class Step:
    """seconds: that one of its tasks may take. tasks: of the scope, the device, and what was found before.

    again: whether a call that goes on does it once more, for what is still to be done: Triton's cache may be another.
    """

    name: str
    seconds: float
    tasks: Callable[[Scope, torch.device, Record], list[Task]]
    again: bool = False


def _contact(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [
        Task("contact", "environment", device, contact.environment),
        Task("contact", "one operator", device, contact.one_operator, (what.sizes[0],)),
        Task("contact", "plans", device, contact.plans, (what.sizes[0],)),
        Task("contact", "peaks", device, contact.measured_peaks),
    ]


def _compile(what: Scope, device: torch.device, record: Record) -> list[Task]:
    small, scaled = _small(what)
    recipes = [
        *(LaunchRecipe(contact.launch_cases, case) for case in (*_in_bfloat16(what), *_in_other_dtypes(what))),
        *(LaunchRecipe(launch_block, (shape,)) for shape in (*_shapes(what), small, scaled)),
        LaunchRecipe(launch_block, (scaled, torch.float16)),
        *(
            LaunchRecipe(models.launch_model, (config, batch, training))
            for config in what.models.values()
            for batch, training in ((what.batch, False), (what.batch, True), (models.FEW, False))
        ),
    ]
    return [Task("compile", "all kernels", device, compiling.compile_all, (tuple(recipes),))]


# Operator, size and dtype: what `contact.checked` takes.
Checked = tuple[str, Size, torch.dtype]


def _check(what: Scope, device: torch.device, record: Record) -> list[Task]:
    small, scaled = _small(what)
    around = [
        Task("check", f"{function.__name__.replace('_', ' ')}, {small.title}", device, function, (small,))
        for function in (
            behaviour.repeated_from_plans,
            behaviour.repeated,
            behaviour.in_a_graph,
            behaviour.on_a_side_stream,
        )
    ]
    around.append(Task("check", f"scaled autocast, {scaled.title}", device, behaviour.scaled_autocast, (scaled,)))
    operators = _checks("check", _in_bfloat16(what), device)
    first = len(NEEDED) * len(what.sizes)
    return [*operators[:first], *around, *operators[first:]]


def _check_other_dtypes(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return _checks("other dtypes", _in_other_dtypes(what), device)


def _checks(step: str, found: list[Checked], device: torch.device) -> list[Task]:
    return [
        Task(
            step,
            f"{op}, {of_size(op, size)}, {str(dtype).removeprefix('torch.')}",
            device,
            contact.checked,
            (op, size, dtype),
        )
        for op, size, dtype in found
    ]


def _in_bfloat16(what: Scope) -> list[Checked]:
    """What DeiT-S and -B need first."""
    rest = tuple(op for op in OPS if op not in NEEDED)
    return [(op, size, torch.bfloat16) for ops in (NEEDED, rest) for size in what.sizes for op in ops]


def _in_other_dtypes(what: Scope) -> list[Checked]:
    return [(op, size, dtype) for dtype in (torch.float16, torch.float32) for size in what.sizes for op in OPS]


def _shapes(what: Scope) -> list[Shape]:
    return [
        Shape(width, what.batch, what.tokens, training=training) for width in what.widths for training in (False, True)
    ]


def _small(what: Scope) -> tuple[Shape, Shape]:
    """A block in bfloat16 and one of float32 weights, for what is not timed."""
    small = Shape(what.widths[0], min(8, what.batch), what.tokens, training=True)
    return small, replace(small, dtype=torch.float32)


def _list_operators(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [Task("operators", shape.title, device, launches.listed, (shape,)) for shape in _shapes(what)]


def _time_operators(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [
        Task("launches", f"{shape.title}, {place}: {name}", device, launches.operator_times, (shape, place))
        for shape in _shapes(what)
        for place, name in enumerate(record.result("operators", shape.title) or ())
    ]


def _time_eager(what: Scope, device: torch.device, record: Record) -> list[Task]:
    return _times("models", what, device, models.EAGER)


def _time_compiled(what: Scope, device: torch.device, record: Record) -> list[Task]:
    """By themselves: to compile one takes most of a minute."""
    return _times("compiled", what, device, models.COMPILED)


def _times(step: str, what: Scope, device: torch.device, contenders: tuple[str, ...]) -> list[Task]:
    whole = [
        Task(
            step,
            f"DeiT-{name}, batch {what.batch}, {'training' if training else 'inference'}, {contender}",
            device,
            models.model_time,
            (config, what.batch, training, contender),
        )
        for name, config in what.models.items()
        for training in (False, True)
        for contender in contenders
    ]
    blocks = [
        Task(step, f"block, {shape.title}, {contender}", device, models.block_time, (shape, contender))
        for shape in _shapes(what)
        for contender in contenders
    ]
    return [*whole, *blocks]


def _tune(what: Scope, device: torch.device, record: Record) -> list[Task]:
    """The operators furthest from their bound; after the first few, where a step's time goes and the worst launches."""
    timed = {
        f"{shape.title}, {place}: {name}": (shape, place)
        for shape in _shapes(what)
        for place, name in enumerate(record.result("operators", shape.title) or ())
    }
    tuned = [
        Task("tuning", name, device, tuning.tune_operator, timed[name])
        for name in furthest_from_bound(record)
        if name in timed
    ]
    name, config = next(iter(what.models.items()))
    profiles = [
        Task(
            "tuning",
            f"profile of DeiT-{name}, batch {what.batch}, {'training' if training else 'inference'}",
            device,
            tuning.profiled_model,
            (config, what.batch, training),
        )
        for training in (False, True)
    ]
    worst = [
        Task("tuning", f"ncu: {symbol} in {name}", device, tuning.nsight, (timed[name][0], symbol))
        for name, symbol in worst_launches(record)[:3]
        if name in timed
    ]
    return [*tuned[:_TUNED_FIRST], *profiles, *worst, *tuned[_TUNED_FIRST:]]


STEPS = (
    Step("contact", 60, _contact),
    Step("compile", 240, _compile, again=True),
    Step("check", 60, _check),
    Step("operators", 60, _list_operators),
    Step("launches", 60, _time_operators),
    Step("models", 60, _time_eager),
    Step("other dtypes", 60, _check_other_dtypes),
    Step("compiled", 120, _time_compiled),
    Step("tuning", 150, _tune),
)
