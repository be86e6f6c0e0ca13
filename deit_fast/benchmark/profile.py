"""Where a step's time on a GPU goes: PyTorch's profiler times the kernels, the launches' metadata says what they do."""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import triton

from deit_fast.benchmark.tables import figures
from deit_fast.benchmark.tables import table as markdown_table

STEPS = 3


@dataclass
class KernelTime:
    """All launches of one kernel in a step. flops, moved (bytes): by its metadata; 0 where it has none."""

    name: str
    calls: float
    seconds: float
    flops: float = 0.0
    moved: float = 0.0


def profiled(step: Callable[[], object]) -> list[KernelTime]:
    """Of one call of `step` on a GPU, the longest first."""
    step()
    with launches() as metadata, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    return by_kernel(_kernels(profiler), metadata, STEPS)


@contextmanager
def launches() -> Iterator[list[dict]]:
    """The list fills with the metadata of the block's launches, in order."""
    found: list[dict] = []

    def noted(metadata: Any) -> None:
        found.append(dict(metadata.get()))

    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(noted)
    try:
        yield found
    finally:
        hook.remove(noted)


def _kernels(profiler: torch.profiler.profile) -> list[tuple[str, float]]:
    """Name and seconds of what ran on the GPU, in order."""
    on_gpu = [event for event in profiler.events() if event.device_type != torch.autograd.DeviceType.CPU]
    return [
        (event.name, event.time_range.elapsed_us() * 1e-6)
        for event in sorted(on_gpu, key=attrgetter("time_range.start"))
    ]


def by_kernel(kernels: Iterable[tuple[str, float]], metadata: Iterable[dict], steps: int) -> list[KernelTime]:
    """`kernels` in the order in which they ran, `metadata` in that of their launches: one stream runs them alike."""
    waiting: dict[str, deque[dict]] = defaultdict(deque)
    for each in metadata:
        waiting[each.get("symbol", each["name"])].append(each)
    found: dict[str, KernelTime] = {}
    for name, seconds in kernels:
        known: dict[str, Any] = waiting[name].popleft() if waiting[name] else {"name": name}
        total = found.setdefault(known["name"], KernelTime(known["name"], 0.0, 0.0))
        total.calls += 1 / steps
        total.seconds += seconds / steps
        total.flops += sum(value for key, value in known.items() if key.startswith("flops")) / steps
        total.moved += known.get("bytes", 0) / steps
    return sorted(found.values(), key=attrgetter("seconds"), reverse=True)


def table(kernels: list[KernelTime]) -> str:
    """Markdown. Rates are of what the launches say they do; stock kernels do not say."""
    whole = sum(each.seconds for each in kernels)
    rows = []
    for each in kernels:
        rates = [
            f"{rate / each.seconds / scale:.2f}" if rate and each.seconds else ""
            for rate, scale in ((each.flops, 1e12), (each.moved, 1e9))
        ]
        part = 100 * each.seconds / whole if whole else 0.0
        rows.append((each.name, f"{each.calls:g}", f"{1e6 * each.seconds:.1f}", f"{part:.1f} %", *rates))
    return markdown_table(("kernel", *figures(("calls a step", "µs a step", "of the step", "TFLOP/s", "GB/s"))), rows)
