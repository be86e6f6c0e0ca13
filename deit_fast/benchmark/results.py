"""What a run of `deit-fast bench` found: as JSON, which holds all of it, and as CSV, Markdown and a table."""

import csv
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deit_fast.benchmark import operator_results
from deit_fast.benchmark.clock import Interval, faster, interval
from deit_fast.benchmark.contenders import CONTENDERS, Case
from deit_fast.benchmark.host import HostTime, table
from deit_fast.benchmark.measure import Row
from deit_fast.benchmark.operators import OperatorRow
from deit_fast.benchmark.peaks import Peaks
from deit_fast.benchmark.profile import KernelTime
from deit_fast.benchmark.profile import table as kernel_table
from deit_fast.benchmark.tables import figures
from deit_fast.benchmark.tables import table as markdown_table

_VERSION = 2


@dataclass
class Results:
    """environment: device, driver, versions, command, commit: what a reader needs to do it again.

    rows: of models; operators: of their operators; kernels: by title, where a step's time goes. peaks: of the device.
    """

    environment: dict[str, str]
    rows: list[Row]
    host: list[HostTime] = field(default_factory=list)
    operators: list[OperatorRow] = field(default_factory=list)
    kernels: dict[str, list[KernelTime]] = field(default_factory=dict)
    peaks: Peaks | None = None

    def write(self, file: Path) -> None:
        """Whole or not at all: what was measured before survives an interruption."""
        content = {"version": _VERSION, **asdict(self)}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, file)

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
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no result of deit-fast bench: {type(error).__name__}: {error}") from error


def _row(kind: type, content: dict):
    return kind(**{**content, "case": Case(**content["case"])})


@dataclass(frozen=True)
class Line:
    """A row beside the others of its case. ratio: of its stock contender's time to its own, round by round."""

    row: Row
    seconds: Interval | None
    ratio: Interval | None
    against: str | None

    @property
    def images_per_second(self) -> float | None:
        return None if self.seconds is None else self.row.case.batch / self.seconds.median


def lines(rows: Iterable[Row]) -> list[Line]:
    """deit_fast against the contender it stands in for, all others against timm."""
    rows = list(rows)
    found = []
    for row in rows:
        against = CONTENDERS[row.contender].stock or "timm"
        other = next((r for r in rows if r.case == row.case and r.contender == against and r.seconds), None)
        ratio = None if other is None or other is row else faster(row.seconds, other.seconds)
        found.append(Line(row, interval(row.seconds) if row.seconds else None, ratio, against if ratio else None))
    return found


HEADER = (
    "contender", "images/s", "ms a call", "times faster than", "GFLOP/image (stock)", "TFLOP/s (of peak)", "calls",
    "saved MiB/image", "peak MiB", "error",
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
        f"{1e3 * seconds.median:.2f} ({1e3 * seconds.low:.2f}–{1e3 * seconds.high:.2f})",
        ""
        if line.ratio is None
        else f"{line.ratio.median:.2f} ({line.ratio.low:.2f}–{line.ratio.high:.2f}) {line.against}",
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


def by_case(rows: Iterable[Row]) -> dict[Case, list[Line]]:
    grouped: dict[Case, list[Line]] = {}
    for line in lines(rows):
        grouped.setdefault(line.row.case, []).append(line)
    return grouped


NOTES = (
    "Medians, with what they may be at 95 % by order statistics. 'Times faster' is the median of the rounds' ratios: "
    "in every round each contender has its turn. A training step is forward, cross-entropy and backward, without an "
    "optimizer; transformers has no drop path. GFLOP are those computed (and those of the model replaced, where they "
    "differ), with as many samples dropped as one seed drops of two images; TFLOP/s follow from them. Error: of the "
    "logits, drop path off, against the same model in float64."
)

HOST_NOTE = (
    "Python and dispatcher, not a GPU's host time: timm's block and DeiT at a width of 64, the launch stubbed on "
    "deit_fast's side, an empty batch on the stock side, medians of rounds in turn."
)


def markdown(results: Results, plots: Iterable[str] = ()) -> str:
    """The page: environment, a table for each case, plots."""
    parts = ["# deit-fast bench", "\n".join(f"- {name}: {value}" for name, value in results.environment.items()), NOTES]
    for case, group in by_case(results.rows).items():
        rows = (cells(line, results.peaks) for line in group)
        parts += [f"## {case.title}", markdown_table((HEADER[0], *figures(HEADER[1:])), rows)]
    if results.operators:
        parts += operator_results.markdown(results.operators, results.peaks)
    for title, kernels in results.kernels.items():
        parts += [f"## Kernels: {title}", kernel_table(kernels)]
    if results.host:
        parts += ["## Host time", HOST_NOTE, table(results.host)]
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    return "\n\n".join(parts) + "\n"


def write_csv(results: Results, file: Path) -> None:
    """With the column names of timm's benchmark tables, and the contender's."""
    columns = ["model", "contender", "precision"]
    for step in ("infer", "train"):
        columns += [f"{step}_{name}" for name in ("img_size", "batch_size", "samples_per_sec", "step_time", "gmacs")]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        for line in lines(results.rows):
            if line.seconds is None:
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
    """Case, contender, before / after in time, and what that says, of what both measured.

    A change is one whose intervals at 95 % do not meet.
    """
    old = {(row.case, row.contender): row for row in before.rows if row.seconds}
    found = []
    for row in after.rows:
        earlier = old.get((row.case, row.contender))
        if not row.seconds or earlier is None:
            continue
        was, now = interval(earlier.seconds), interval(row.seconds)
        verdict = "faster" if now.high < was.low else "slower" if now.low > was.high else "within noise"
        found.append((row.case.title, row.contender, was.median / now.median, verdict))
    return found
