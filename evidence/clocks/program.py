"""What one program of a launch takes of its multiprocessor: clocks of each resource, counted along its way."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields

from evidence.clocks import amd, sass
from evidence.clocks.flow import Flow, Instruction
from evidence.clocks.gpus import Gpu

_BARRIER = 25  # clocks; assumed
_WGMMA_WAIT = 40  # clocks of a full wait for wgmma; assumed
# Multiply-adds between the products of one turn that make the two wait for each other.
_IN_A_CHAIN = 16


@dataclass(frozen=True)
class Program:
    """Clocks of a whole multiprocessor with all its slots of a kind: issue, fp32, alu, special, shared, tensor.

    On AMD all vector instructions are `fp32` and LDS is `shared`; `issue` is an instruction a clock of a SIMD unit,
    alu and special are nothing. flops: of matrix instructions. l2, stored: bytes from and to global memory, and to it
    alone.

    For the model: alone: clocks of one program that has the multiprocessor for itself, less the wait for its first
    loads; chained: whether arithmetic and products of its loops wait for each other; reads_late: whether it loads a
    tile behind its last loop.
    """

    issue: float = 0
    fp32: float = 0
    alu: float = 0
    special: float = 0
    shared: float = 0
    tensor: float = 0
    flops: float = 0
    l2: float = 0
    stored: float = 0
    alone: float = 0
    chained: bool = False
    reads_late: bool = False

    @property
    def clocks(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("issue", "fp32", "alu", "special", "shared", "tensor")}


def program(flow: Flow, gpu: Gpu, warps: int, trips: Mapping[int, float]) -> Program:
    """Of the way that enters loops by `trips`. Products that don't tell their shape (tcgen05's) count as none."""
    ways = flow.way(trips, lambda block: _issue(flow.blocks[block], gpu))
    looped_copies = any(
        flow.innermost[block] is not None and any(i.name.startswith("LDGSTS") for i in flow.blocks[block])
        for block in ways
    )
    last_loop = max((block for block in ways if flow.innermost[block] is not None), default=None)
    total: defaultdict[str, float] = defaultdict(float)
    chained, late = False, 0.0
    for block, times in ways.items():
        own: defaultdict[str, float] = defaultdict(float)
        in_loop = flow.innermost[block] is not None
        for instruction in flow.blocks[block]:
            costs = _cost(instruction, gpu)
            if looped_copies and not in_loop and instruction.name.startswith("LDGSTS"):
                # The loop loads as much again for turns that it does not make; these are counted there.
                costs = {"issue": costs["issue"]}
            for name, clocks in costs.items():
                own[name] += clocks
        kinds: defaultdict[str, float] = defaultdict(float)
        for instruction in flow.blocks[block]:
            kind, flops = _flops(instruction, warps, gpu)
            kinds[kind] += flops
        tensor = sum(flops / gpu.flops(kind) for kind, flops in kinds.items() if flops)
        arithmetic = sum(instruction.name.split(".")[0] in sass.FP32 for instruction in flow.blocks[block])
        chained |= in_loop and tensor > 0 and arithmetic > _IN_A_CHAIN
        if last_loop is not None and block > last_loop:
            late += own["global"] - own["stored"]
        whole = {name: own[name] * warps / 4 for name in ("issue", "fp32", "alu", "special")}
        whole["shared"] = own["shared"] * warps
        found = whole | {
            "tensor": tensor,
            "flops": sum(kinds.values()),
            "l2": own["global"] * warps,
            "stored": own["stored"] * warps,
            "alone": _alone(flow.blocks[block], whole, tensor, in_loop, gpu),
        }
        for name, value in found.items():
            total[name] += times * value
    late *= warps
    return Program(**total, chained=chained, reads_late=late >= total["stored"] > 0)


def _alone(block: list[Instruction], clocks: Mapping[str, float], tensor: float, in_loop: bool, gpu: Gpu) -> float:
    """Modelled clocks of one turn of a block: the stalls it asks for, or the slots it takes if they are more."""
    stalls = sum(instruction.stall for instruction in block if instruction.name != "NOP")
    found = max(stalls, *clocks.values())
    waits = sum(i.name.startswith("WARPGROUP.DEPBAR") and "gsb0, 0x0" in i.text for i in block)
    if waits and any(i.name.startswith("HGMMA") for i in block):
        found += tensor + _WGMMA_WAIT * waits
    found = max(found, tensor)
    if in_loop and gpu.assumed and any(i.name.split(".")[0] == "LDG" for i in block):
        found += gpu.assumed.cached_load
    return found + _BARRIER * sum(i.name.startswith(("BAR", "s_barrier")) for i in block)


def _cost(instruction: Instruction, gpu: Gpu) -> dict[str, float]:
    if gpu.target.is_amd:
        return amd.cost(instruction, gpu.target.gpu.warp_size)
    return sass.cost(instruction, gpu.fp32_lanes)


def _flops(instruction: Instruction, warps: int, gpu: Gpu) -> tuple[str, float]:
    return (amd if gpu.target.is_amd else sass).flops(instruction, warps)


def _issue(block: list[Instruction], gpu: Gpu) -> float:
    return sum(_cost(instruction, gpu).get("issue", 0) for instruction in block)


def mean(programs: Mapping[Program, int]) -> Program:
    """The average of so many programs of each kind."""
    count = sum(programs.values())
    average = {
        field.name: sum(n * getattr(program, field.name) for program, n in programs.items()) / count
        for field in fields(Program)
        if field.type is float or field.type == "float"
    }
    return Program(
        **average,
        chained=any(program.chained for program in programs),
        reads_late=any(program.reads_late for program in programs),
    )
