"""What `deit_fast.swap` did, module by module, and its table."""

import re
from dataclasses import dataclass, field

from deit_fast.ops import backend

# A number between dots: the place in a ModuleList or Sequential.
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass
class SwapReport:
    """`swapped`: names of the modules that run on the operators. `kept`: name → why its stock forward runs.

    `readout`: name of a classifier → why its last block is computed for more than the rows that it reads, or None.
    The root module's name is the empty string, as in `named_modules()`. `classes`: name → class, of both.
    `lacking`: why the stock operators run on the GPUs that the model is on, where they do.
    Printed, it is a table in which numbered modules (`blocks.0` … `blocks.11`) share a row, with what GPUs were found
    to lack, the operators whose kernels have failed, and what the vendor's GEMM has computed, in this process so far.
    """

    swapped: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    readout: dict[str, str | None] = field(default_factory=dict)
    lacking: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows: dict[str, tuple[str, ...]] = {
            name: (class_name, f"kept: {self.kept[name]}" if name in self.kept else "swapped")
            for name, class_name in self.classes.items()
        }
        modules = table(("module", "class", "number", "outcome"), rows)
        readout = [f"last block of {name or '(model)'}: {_readout(reason)}" for name, reason in self.readout.items()]
        stock = [f"stock operators run: {reason}" for reason in sorted(backend.lacking.union(self.lacking))]
        stock += [
            f"kernels of {op} failed for {asked} on {device}, stock operators run: {reason}"
            for op, asked, device, reason in backend.failed.values()
        ]
        if backend.by_vendor:
            stock.append(f"by the vendor's GEMM: {', '.join(backend.by_vendor)}")
        return "\n".join((f"{len(self.swapped)} swapped, {len(self.kept)} kept", "", modules, *readout, *stock))


def table(heads: tuple[str, ...], rows: dict[str, tuple[str, ...]]) -> str:
    """Of modules by name, those that differ in a number alone in one line; heads: module, class, number, the rest."""
    # (name with its numbers left out, the rest) → the names it stands for
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in rows.items():
        groups.setdefault((_INDEX.sub("#", name), *row), []).append(name)
    lines = [heads]
    lines += [(_joined(names), kind, str(len(names)), *rest) for (_, kind, *rest), names in groups.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
    # Numbers to the right, the last column as it comes.
    layout = "  ".join([*(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths)), "{}"])
    texts = [layout.format(*line) for line in lines]
    return "\n".join((texts[0], "-" * max(map(len, texts)), *texts[1:]))


def _readout(reason: str | None) -> str:
    return "only the rows that are read" if reason is None else f"all rows, since {reason}"


def _joined(names: list[str]) -> str:
    """One label for names that differ in their numbers: `blocks.0-11.attn`."""
    if len(names) == 1:
        return names[0] or "(model)"
    numbers = [list(map(int, _INDEX.findall(name))) for name in names]
    ranges = iter(_ranges(sorted(set(column))) for column in zip(*numbers, strict=True))
    return _INDEX.sub(lambda _: next(ranges), names[0])


def _ranges(numbers: list[int]) -> str:
    """Sorted whole numbers, runs joined: [0, 1, 2, 5] → "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
