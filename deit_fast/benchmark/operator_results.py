"""Tables and a plot of operators beside the roofline."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from deit_fast.benchmark.clock import Interval, faster, interval
from deit_fast.benchmark.contenders import ModelCase, is_ours
from deit_fast.benchmark.measure import best_peer
from deit_fast.benchmark.operators import OperatorRow
from deit_fast.benchmark.peaks import Peaks
from deit_fast.benchmark.tables import figures, remarks, spread, table

HEADER = (
    "operator", "contender", "µs a call", "times faster than stock", "than the best peer", "TFLOP/s", "GB/s",
    "of the roofline", "error",
)  # fmt: skip
NOTE = (
    "Each operator of one step, drop path off, by itself. GB/s count its distinct inputs and outputs once, TFLOP/s its "
    "matrix products. The best peer is the fastest that is not deit_fast's. The roofline is the longer of what these "
    "take at the device's peaks; what an operator reads from a cache can pass it."
)


def share(row: OperatorRow, peaks: Peaks | None) -> float | None:
    """How much of the time that `row` took its roofline would have taken."""
    bound = None if peaks is None else peaks.bound(row.case.amp or row.case.dtype, row.flops, row.moved)
    return None if bound is None or not row.seconds else bound / interval(row.seconds).median


def of_same_call(row: OperatorRow, rows: Iterable[OperatorRow]) -> list[OperatorRow]:
    what = attrgetter("case", "operator", "shape")
    return [other for other in rows if what(other) == what(row)]


def ratio(row: OperatorRow, rows: Iterable[OperatorRow]) -> Interval | None:
    """Of the stock operator's time to the row's, round by round."""
    stock = next((other for other in of_same_call(row, rows) if other.contender == "stock"), row)
    return None if stock is row else faster(row.seconds, stock.seconds)


def best(row: OperatorRow, rows: Iterable[OperatorRow]) -> str:
    """The same with the fastest contender that is not deit_fast's, and its name, for those that are."""
    peer = best_peer(of_same_call(row, rows)) if is_ours(row.contender) else None
    return "" if peer is None else f"{spread(faster(row.seconds, peer.seconds))} {peer.contender}"


def cells(row: OperatorRow, rows: list[OperatorRow], peaks: Peaks | None) -> tuple[str, ...]:
    """One line of a table under `HEADER`."""
    name = f"{row.times} × {row.operator} {row.shape.replace(',', ' ')}"
    if not row.seconds:
        return (name, row.contender, row.failure or "not timed", *[""] * (len(HEADER) - 3))
    seconds, part = interval(row.seconds), share(row, peaks)
    return (
        name,
        row.contender,
        spread(seconds, 1e6, digits=1),
        spread(ratio(row, rows)),
        best(row, rows),
        "" if not row.flops else f"{row.flops / seconds.median / 1e12:.2f}",
        f"{row.moved / seconds.median / 1e9:.1f}",
        "" if part is None else f"{100 * part:.0f} %",
        "" if row.error is None else f"{row.error:.1e}",
    )


def by_case(rows: Iterable[OperatorRow]) -> dict[ModelCase, list[OperatorRow]]:
    grouped: dict[ModelCase, list[OperatorRow]] = {}
    for row in rows:
        grouped.setdefault(row.case, []).append(row)
    return grouped


def markdown(rows: list[OperatorRow], peaks: Peaks | None) -> list[str]:
    """Parts of the page."""
    parts = ["# Operators", NOTE]
    for case, group in by_case(rows).items():
        lines = (cells(row, group, peaks) for row in group)
        parts += [f"## {case.title}", table((*HEADER[:2], *figures(HEADER[2:])), lines), *remarks(group)]
    return parts


def plot(pyplot: Any, case: ModelCase, rows: list[OperatorRow], peaks: Peaks | None) -> Any:
    """A bar for each contender of each operator, all calls of a step together, and a mark at the roofline."""
    timed = [row for row in rows if row.seconds]
    figure, axis = pyplot.subplots(figsize=(9, 1 + 0.3 * len(timed)))
    colours = {"deit_fast": "#d1495b", "deit_fast, tuned": "#edae49"}
    names = [f"{row.times} × {row.operator} {row.shape.split(',')[0]}: {row.contender}" for row in timed]
    places = range(len(timed))
    spent = [1e3 * row.times * interval(row.seconds).median for row in timed]
    axis.barh(places, spent, color=[colours.get(row.contender, "#8d99ae") for row in timed])
    axis.set_yticks(places, names, fontsize=7)
    marks = [(place, share(row, peaks)) for place, row in zip(places, timed, strict=True)]
    marks = [(place, part * spent[place]) for place, part in marks if part is not None]
    if peaks is not None and marks:
        axis.plot([x for _, x in marks], [y for y, _ in marks], "k|", markersize=9, label=f"roofline: {peaks.source}")
        axis.legend(fontsize=7)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel("ms a step", fontsize=9)
    axis.set_title(case.title, fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    return figure
