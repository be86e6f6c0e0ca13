"""The counted blocks as text."""

from collections.abc import Iterable, Sequence

from deit_fast.benchmark.tables import table
from evidence.clocks import launch, stock
from evidence.clocks.block import Block, Line
from evidence.clocks.checks import Check
from evidence.clocks.gpus import GPUS, Gpu

ABOUT = f"""\
Made without a GPU: `python -m evidence.clocks`. **Counted** figures come out of the machine code and the sizes of each
launch. **Modelled** ones are made of them with constants set by hand. **Estimated** ones are of other people's kernels.
None was measured.

- floor: what a launch takes at least, counted: the busiest of issue slots, fp32 units, special-function units, tensor
  cores and memory, each used without a gap at its data sheet's rate, all multiprocessors loaded alike.
- modelled: whole waves of programs, {launch.REACHED:.0%} of each slot's and of the L2 cache's rate,
  {launch.REACHED_OF_MEMORY:.0%} of the memory's; {launch.NOT_HIDDEN:g} of the shorter of memory's and all other time
  not hidden, {launch.NOT_OVERLAPPED:g} of the shorter of issue and tensor time where they wait for each other;
  {launch.LAUNCH:g} µs a launch.
- vendor's GEMM: a product that the shipped settings leave to it. Its code is not counted: the floor is its operations
  or its bytes at the data sheet's rates; the time is NVIDIA's heuristic's, nvMatmulHeuristics, where that was asked.
- P: programs; R: programs that a multiprocessor holds at once; waves: P / (R × multiprocessors).
- issue, tensor: clocks of one program's instructions and products, all four quarters of a multiprocessor full.
"""


def blocks_table(found: Sequence[tuple[Block, Sequence[Line]]]) -> str:
    """A row for each step of each block."""
    rows = []
    for block, lines in found:
        gpu = GPUS.get(block.target)
        for step in dict.fromkeys(line.step for line in lines):
            these = [line for line in lines if line.step == step]
            estimates = _stock(gpu, block, step)
            rows.append(
                (_gpu(block), block.model, block.precision, block.batch, step, len(these), *_sums(these), *estimates)
            )
    return table(
        (
            "GPU", "block of", "precision", "batch:", "step", "launches:", "floor µs, counted:", "µs, modelled:",
            "compiled stock µs, estimated:", "eager stock µs, estimated:",
        ),
        rows,
    )  # fmt: skip


def launches_table(lines: Iterable[Line]) -> str:
    rows = [
        (
            line.step, line.name, line.programs, line.resident, _figure(line.waves, 2), line.registers,
            *(_figure(line.clocks and line.clocks[name]) for name in ("issue", "tensor")),
            f"{line.dram / 1e6:.0f}", _figure(line.floor), line.floor_bound or line.uncounted, _figure(line.modelled),
            line.modelled_bound or "–",
        )
        for line in lines
    ]  # fmt: skip
    return table(
        (
            "step", "launch", "P:", "R:", "waves:", "registers:", "issue:", "tensor:", "MB:", "floor µs:", "of",
            "modelled µs:", "of",
        ),
        rows,
    )  # fmt: skip


def checks_table(found: Iterable[tuple[Check, float]]) -> str:
    rows = [
        (
            check.what, check.gpu, f"{model:.0f}", f"{check.published:.0f}", check.unit, check.source,
            f"{100 * (model / check.published - 1):+.0f} %",
        )
        for check, model in found
    ]  # fmt: skip
    return table(("what", "GPU", "model:", "published:", "unit", "published in", "off:"), rows)


def page(found: Sequence[tuple[Block, Sequence[Line]]], checks: Sequence[tuple[Check, float]]) -> str:
    parts = ["# What each launch takes of the clocks\n", ABOUT, "## A block\n", blocks_table(found)]
    if checks:
        parts += ["\n## How far off the model is\n", checks_table(checks)]
    for block, lines in found:
        title = f"{_gpu(block)}, {block.model}, {block.precision}, batch {block.batch}"
        parts += [f"\n## {title}\n", launches_table(lines)]
    return "\n".join(parts) + "\n"


def _gpu(block: Block) -> str:
    return GPUS[block.target].name if block.target in GPUS else block.target


def _sums(lines: Sequence[Line]) -> tuple[str, str]:
    """Of floors and modelled times; nothing where a launch has none."""
    sums = []
    for times in ([line.floor for line in lines], [line.modelled for line in lines]):
        known = [time for time in times if time is not None]
        sums.append(f"{sum(known):,.0f}" if len(known) == len(times) else "–")
    return sums[0], sums[1]


def _stock(gpu: Gpu | None, block: Block, step: str) -> tuple[str, str]:
    width = {"tiny": 192, "small": 384, "base": 768}.get(block.model)
    if gpu is None or width is None or block.batch != stock.BATCH or block.precision != "bf16":
        return "–", "–"
    if not stock.known(gpu, width):
        return "–", "–"
    compiled, eager = (stock.estimate(gpu, width, kind)[step] for kind in ("compiled", "eager"))
    return f"{compiled:,.0f}", f"{eager:,.0f}"


def _figure(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"
