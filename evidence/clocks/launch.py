"""From the counts of a launch to its floor, which is counted, and to a time, which is modelled."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
from triton.compiler import CompiledKernel

from deit_fast.check.standin_driver import RecordedLaunch
from evidence.clocks import amd, sass, source, trips
from evidence.clocks.flow import flow
from evidence.clocks.gpus import Gpu
from evidence.clocks.program import Program, mean, program
from evidence.clocks.source import Uncounted

# What a floor is counted by: how many a clock every manual of the GPU says. Not so the shared memory's accesses, which
# may conflict, nor `alu`, since no manual tells which unit takes which instruction.
SURE = ("issue", "fp32", "special", "tensor")
# Set by hand so that the model meets the first published figures of `checks`: it has no other ground. The share of a
# slot's or the L2's peak that kernels reach, and of the memory's; how much of the shorter of memory's and everything
# else's time is not hidden behind the longer; how much of the shorter of arithmetic and products, where they wait for
# each other; µs that a launch takes whatever it does; waves up to which they are whole; loads that a program waits for.
REACHED = 0.80
REACHED_OF_MEMORY = 0.88
NOT_HIDDEN = 0.4
NOT_OVERLAPPED = 0.5
LAUNCH = 2.0
WHOLE_WAVES = 4
LATE_LOAD = 0.7
FIRST_LOAD_WITHOUT_LOOP = 1.3


@dataclass(frozen=True)
class Sizes:
    """Of one launch: its grid, the shape and dtype of its tensors, and the numbers among its arguments."""

    grid: tuple[int, ...]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    scalars: Mapping[str, float]

    @classmethod
    def of(cls, launch: RecordedLaunch) -> "Sizes":
        return cls(launch.grid, launch.tensors, launch.scalars)

    @property
    def bytes(self) -> int:
        """Of every tensor, once."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.tensors.values())


@dataclass(frozen=True)
class Count:
    """A launch, counted: its programs by kind, what one multiprocessor holds at once, and its bytes of memory."""

    programs: Mapping[Program, int]
    resident: int
    dram: int
    looped: bool

    @property
    def number(self) -> int:
        return sum(self.programs.values())

    @property
    def average(self) -> Program:
        return mean(self.programs)

    def waves(self, gpu: Gpu) -> float:
        return self.number / (gpu.multiprocessors * max(1, self.resident))


def count(kernel: CompiledKernel, sizes: Sizes, gpu: Gpu, resident: int) -> Count:
    """resident: programs that a multiprocessor holds at once.

    Raises:
        Uncounted: the code's loops or products and the source's don't match, or how often a loop turns depends on what
            memory holds.
    """
    assembly = amd if gpu.target.is_amd else sass
    code = flow(assembly.instructions(kernel.asm["amdgcn" if gpu.target.is_amd else "sass"]))
    warps = kernel.metadata.num_warps
    shapes = {name: shape for name, (shape, _) in sizes.tensors.items()}
    of_source = source.source(kernel.asm["ttgir"], sizes.grid, sizes.scalars, shapes)
    untold = any(sass.is_shapeless_product(instruction) for block in code.blocks for instruction in block)
    own: list[float | None] = []
    for loop in range(len(code.loops)):
        in_loop = [instruction for block in code.own_blocks(loop) for instruction in code.blocks[block]]
        told = not any(map(sass.is_shapeless_product, in_loop))
        own.append(float(sum(assembly.flops(instruction, warps)[1] for instruction in in_loop)) if told else None)
    found: dict[Program, int] = {}
    for group in trips.programs(code, own, of_source):
        kind = program(code, gpu, warps, group.trips)
        if untold:  # where the instructions don't tell their products, the source does
            kind = replace(kind, flops=group.flops, tensor=group.flops / gpu.flops("16 bits"))
        elif kind.flops > group.flops:
            kind = program(code, gpu, warps, trips.less_peeled(code, own, group, kind.flops))
        if kind.flops < 0.99 * group.flops:
            raise Uncounted(f"{kind.flops:.3g} FLOPs in the machine code, {group.flops:.3g} in the source")
        found[kind] = found.get(kind, 0) + group.count
    return Count(found, resident, sizes.bytes, bool(code.loops))


def floor(count: Count, gpu: Gpu) -> tuple[float, str]:
    """µs that the launch takes at least, and what of: with every slot of the busiest resource full, perfect balance."""
    slots = _slots(count.average, gpu, count.number / gpu.multiprocessors)
    times = {name: slots[name] for name in SURE}
    times["memory"] = count.dram / (gpu.device.bandwidth * 1e3)
    bound = max(times, key=times.__getitem__)
    return times[bound], bound


@dataclass(frozen=True)
class Modelled:
    """A time that nobody has measured, and what it is mostly made of."""

    microseconds: float
    bound: str


def modelled(count: Count, gpu: Gpu) -> Modelled | None:
    """Whole waves of programs, each resource reached in part; None for a GPU without assumptions."""
    if gpu.assumed is None:
        return None
    resident = max(1, count.resident)
    on_one = count.number / gpu.multiprocessors
    few = on_one <= WHOLE_WAVES * resident
    average = count.average
    times = _slots(average, gpu, ceil(on_one) if few else on_one + 0.5)
    times["l2"] = count.number * average.l2 / (gpu.assumed.l2 * 1e3)
    times = {name: time / REACHED for name, time in times.items()}
    if average.chained:
        busiest = max(times.values())
        times["overlap"] = busiest + NOT_OVERLAPPED * min(times["issue"], times["tensor"])
    loads = (1.0 if count.looped else FIRST_LOAD_WITHOUT_LOOP) + (LATE_LOAD if average.reads_late else 0)
    waves = ceil(on_one / resident) if few else on_one / resident + 0.5
    times["latency"] = waves * gpu.microseconds(average.alone + loads * gpu.assumed.first_load)
    memory = count.dram / (gpu.device.bandwidth * 1e3) / REACHED_OF_MEMORY
    rest = max(times.values())
    times["memory"] = memory
    bound = max(times, key=times.__getitem__)
    return Modelled(times[bound] + NOT_HIDDEN * min(memory, rest) + LAUNCH, bound)


def _slots(average: Program, gpu: Gpu, programs: float) -> dict[str, float]:
    return {name: gpu.microseconds(programs * clocks) for name, clocks in average.clocks.items()}
