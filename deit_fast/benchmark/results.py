"""What a run of `deit-fast bench` found: as JSON, which holds all of it, and as CSV, Markdown and a table."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from deit_fast.benchmark import operator_results
from deit_fast.benchmark.clock import Interval, faster, interval
from deit_fast.benchmark.contenders import CONTENDERS, ModelCase, is_ours
from deit_fast.benchmark.files import write_whole
from deit_fast.benchmark.host import HostTime, table
from deit_fast.benchmark.measure import Row, best_peer
from deit_fast.benchmark.operators import OperatorRow
from deit_fast.benchmark.peaks import Peaks
from deit_fast.benchmark.profile import KernelTime
from deit_fast.benchmark.profile import table as kernel_table
from deit_fast.benchmark.tables import figures, remarks, spread
from deit_fast.benchmark.tables import table as markdown_table

_VERSION = 2


@dataclass
class Results:
    """environment: device, driver, versions, command, commit: what a reader needs to do it again.

    rows: of models; operators: of their operators; kernels: by title, where a step's time goes. peaks: of the device.
    unmeasured: what was asked for and could not be measured at all → why.
    """

    environment: dict[str, str]
    rows: list[Row]
    host: list[HostTime] = field(default_factory=list)
    operators: list[OperatorRow] = field(default_factory=list)
    kernels: dict[str, list[KernelTime]] = field(default_factory=dict)
    peaks: Peaks | None = None
    unmeasured: dict[str, str] = field(default_factory=dict)

    def write(self, file: Path) -> None:
        """Whole or not at all: what was measured before survives an interruption."""
        content = {"version": _VERSION, **asdict(self)}
        write_whole(file, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def read(file: Path) -> "Results":
        """
        Raises:
            ValueError: `file` is not what `write` writes.
        """
        try:
            content = json.loads(file.read_text())
            if content["version"] != _VERSION:
                raise ValueError(f"its version is {content['version']}, this deit_fast reads {_VERSION}")
            return Results(
                content["environment"],
                [_row(Row, row) for row in content["rows"]],
                [HostTime(**each) for each in content["host"]],
                [_row(OperatorRow, row) for row in content["operators"]],
                {title: [KernelTime(**each) for each in found] for title, found in content["kernels"].items()},
                None if content["peaks"] is None else Peaks(**content["peaks"]),
                content.get("unmeasured", {}),
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no result of deit-fast bench: {type(error).__name__}: {error}") from error


_Kind = TypeVar("_Kind", Row, OperatorRow)


def _row(kind: type[_Kind], content: dict) -> _Kind:
    return kind(**{**content, "case": ModelCase(**content["case"])})


@dataclass(frozen=True)
class Line:
    """A row beside the others of its case.

    ratio: of its stock contender's time to its own, round by round. best: the same of the fastest contender that is
    not deit_fast's, for those that are.
    """

    row: Row
    seconds: Interval | None
    ratio: Interval | None
    against: str | None
    best: Interval | None = None
    peer: str | None = None

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.row.case.batch / self.seconds.median


def lines(rows: Iterable[Row]) -> list[Line]:
    """deit_fast against the contender it stands in for and the best of the others, all others against timm."""
    rows = list(rows)
    return [_line(row, [other for other in rows if other.case == row.case and other.seconds]) for row in rows]


def _line(row: Row, timed: list[Row]) -> Line:
    if not row.seconds:
        return Line(row, None, None, None)
    against = CONTENDERS[row.contender].stock or "timm"
    other = next((r for r in timed if r.contender == against and r is not row), None)
    peer = best_peer(timed) if is_ours(row.contender) else None
    return Line(row, interval(row.seconds), *_faster(row, other), *_faster(row, peer))


def _faster(row: Row, other: Row | None) -> tuple[Interval | None, str | None]:
    if other is None:
        return None, None
    ratio = faster(row.seconds, other.seconds)
    return ratio, None if ratio is None else other.contender


HEADER = (
    "contender", "images/s", "ms a call", "times faster than", "than the best peer", "GFLOP/image (stock)",
    "TFLOP/s (of peak)", "calls", "saved MiB/image", "peak MiB", "error",
)  # fmt: skip


def cells(line: Line, peaks: Peaks | None = None) -> tuple[str, ...]:
    """One line of a table under `HEADER`."""
    row = line.row
    if line.seconds is None:
        return (row.contender, row.failure or "not timed", *[""] * (len(HEADER) - 2))
    seconds = line.seconds
    flops = "" if row.flops is None else f"{row.flops / 1e9:.2f}"
    if row.stock_flops not in (None, row.flops):
        flops += f" ({row.stock_flops / 1e9:.2f})"
    return (
        row.contender,
        f"{line.images_per_second:,.1f}",
        spread(seconds, 1e3),
        f"{spread(line.ratio)} {line.against or ''}".strip(),
        f"{spread(line.best)} {line.peer or ''}".strip(),
        flops,
        "" if row.flops is None else _rate(row, row.flops * row.case.batch / seconds.median, peaks),
        "" if row.operator_calls is None else str(row.operator_calls),
        "" if row.saved_bytes is None else f"{row.saved_bytes / 2**20:.1f}",
        "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
        "" if row.error is None else f"{row.error:.1e}",
    )


def _rate(row: Row, rate: float, peaks: Peaks | None) -> str:
    peak = None if peaks is None else peaks.flops.get(row.case.amp or row.case.dtype)
    return f"{rate / 1e12:.2f}" + ("" if peak is None else f" ({100 * rate / peak:.0f} %)")


def by_case(rows: Iterable[Row]) -> dict[ModelCase, list[Line]]:
    grouped: dict[ModelCase, list[Line]] = {}
    for line in lines(rows):
        grouped.setdefault(line.row.case, []).append(line)
    return grouped


NOTES = (
    "Medians, with what they may be at 95 % by order statistics. 'Times faster' is the median of the rounds' ratios: "
    "in every round each contender has its turn. The best peer is the fastest of the case that is not deit_fast's. "
    "A training step is forward, cross-entropy and backward, without an optimizer; transformers has no drop path. "
    "GFLOP are those computed (and those of the model replaced, where they differ); with drop path, the mean over ten "
    "draws of the samples dropped; TFLOP/s follow from them. Peak memory is the contender's own, weights and inputs "
    "included. Error: of the logits, drop path off, against the same model in float64."
)

HOST_NOTE = (
    "Python and dispatcher, not a GPU's host time: operators, timm's block and DeiT at a width of 64, the launch "
    "stubbed on deit_fast's side, an empty batch on the stock side, medians of rounds in turn. The read-out's products "
    "of queries and weights are PyTorch's, and do run."
)


def markdown(results: Results, plots: Iterable[str] = ()) -> str:
    """The page: environment, a table for each case, plots."""
    parts = ["# deit-fast bench", _list(results.environment), NOTES]
    if results.unmeasured:
        parts += ["Not measured:", _list(results.unmeasured)]
    for case, group in by_case(results.rows).items():
        rows = (cells(line, results.peaks) for line in group)
        parts += [f"## {case.title}", markdown_table((HEADER[0], *figures(HEADER[1:])), rows)]
        parts += remarks(line.row for line in group)
    if results.operators:
        parts += operator_results.markdown(results.operators, results.peaks)
    for title, kernels in results.kernels.items():
        parts += [f"## Kernels: {title}", kernel_table(kernels)]
    if results.host:
        parts += ["## Host time", HOST_NOTE, table(results.host)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def _list(items: dict[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in items.items())


def write_csv(results: Results, file: Path) -> None:
    """With the column names of timm's benchmark tables, and the contender's."""
    columns = ["model", "contender", "precision"]
    for step in ("infer", "train"):
        columns += [f"{step}_{name}" for name in ("img_size", "batch_size", "samples_per_sec", "step_time", "gmacs")]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        for line in lines(results.rows):
            if line.seconds is None or line.images_per_second is None:
                continue
            case, step = line.row.case, "train" if line.row.case.training else "infer"
            writer.writerow(
                {
                    "model": case.model,
                    "contender": line.row.contender,
                    "precision": case.precision,
                    f"{step}_img_size": case.img_size,
                    f"{step}_batch_size": case.batch,
                    f"{step}_samples_per_sec": round(line.images_per_second, 2),
                    f"{step}_step_time": round(1e3 * line.seconds.median, 3),
                    f"{step}_gmacs": "" if line.row.flops is None else round(line.row.flops / 2e9, 3),
                }
            )


def compare(before: Results, after: Results) -> list[tuple[str, str, float, str]]:
    """What was measured, of which contender, before / after, and what that says, of what both measured.

    A time has changed where its intervals at 95 % do not meet; host times are medians alone, and memory is counted.
    """
    found = []
    for was, now in _both(before.rows, after.rows, attrgetter("case", "contender")):
        found += _times(now.case.title, was, now)
        for name in ("peak_bytes", "saved_bytes"):
            found += _memory(
                f"{now.case.title}: {name.replace('_', ' ')}", now.contender, getattr(was, name), getattr(now, name)
            )
    of_operator = attrgetter("case", "operator", "shape", "contender")
    for was, now in _both(before.operators, after.operators, of_operator):
        found += _times(f"{now.case.title}: {now.operator} {now.shape.replace(',', ' ')}", was, now)
    for was, now in _both(before.host, after.host, attrgetter("what", "step")):
        for contender in ("stock", "swapped"):
            ratio = getattr(was, contender) / getattr(now, contender)
            found.append((f"host time: {now.what}, {now.step}", contender, ratio, "one median"))
    return found


def _both(before: list, after: list, key: Callable) -> Iterator[tuple]:
    """Pairs of what has the same key."""
    earlier = {key(each): each for each in before}
    return ((earlier[key(each)], each) for each in after if key(each) in earlier)


def _times(what: str, was: Row | OperatorRow, now: Row | OperatorRow) -> list[tuple[str, str, float, str]]:
    if not was.seconds or not now.seconds:
        return []
    old, new = interval(was.seconds), interval(now.seconds)
    verdict = "faster" if new.high < old.low else "slower" if new.low > old.high else "within noise"
    return [(what, now.contender, old.median / new.median, verdict)]


def _memory(what: str, contender: str, was: int | None, now: int | None) -> list[tuple[str, str, float, str]]:
    if not was or not now:
        return []
    return [(what, contender, was / now, "less" if now < was else "more" if now > was else "the same")]
