"""Plots of a run: throughput by contender, time by operator, memory by batch."""

from pathlib import Path
from typing import Any

from deit_fast.benchmark import operator_results
from deit_fast.benchmark.contenders import ModelCase, is_ours
from deit_fast.benchmark.results import Line, Results, by_case

_OURS, _THEIRS = "#d1495b", "#8d99ae"


def write_plots(results: Results, folder: Path) -> list[str]:
    """Names of the files written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    cases = {case: timed for case, group in by_case(results.rows).items() if (timed := [x for x in group if x.seconds])}
    for name, training in (("inference", False), ("training", True)):
        chosen = {case: group for case, group in cases.items() if case.training is training}
        if chosen:
            figure = _throughput(pyplot, chosen)
            figure.savefig(folder / f"throughput-{name}.png", dpi=130, bbox_inches="tight")
            pyplot.close(figure)
            written.append(f"throughput-{name}.png")
    for i, (case, rows) in enumerate(operator_results.by_case(results.operators).items()):
        if any(row.seconds for row in rows):
            figure = operator_results.plot(pyplot, case, rows, results.peaks)
            figure.savefig(folder / f"operators-{i + 1}.png", dpi=130, bbox_inches="tight")
            pyplot.close(figure)
            written.append(f"operators-{i + 1}.png")
    if any(line.row.peak_bytes for group in cases.values() for line in group):
        figure = _memory(pyplot, cases)
        figure.savefig(folder / "memory.png", dpi=130, bbox_inches="tight")
        pyplot.close(figure)
        written.append("memory.png")
    return written


def _throughput(pyplot: Any, cases: dict[ModelCase, list[Line]]) -> Any:
    """A panel for each case; bars of images a second, the interval at 95 % as a whisker."""
    figure, axes = pyplot.subplots(
        len(cases), 1, figsize=(8, sum(0.7 + 0.34 * len(group) for group in cases.values())), squeeze=False,
        gridspec_kw={"height_ratios": [len(group) + 1.5 for group in cases.values()], "hspace": 0.6},
    )  # fmt: skip
    for axis, (case, group) in zip(axes[:, 0], cases.items(), strict=True):
        names = [line.row.contender for line in group]
        seconds = [line.seconds for line in group if line.seconds is not None]
        speeds = [case.batch / each.median for each in seconds]
        spread = [
            [speed - case.batch / each.high for each, speed in zip(seconds, speeds, strict=True)],
            [case.batch / each.low - speed for each, speed in zip(seconds, speeds, strict=True)],
        ]
        colours = [_OURS if is_ours(name) else _THEIRS for name in names]
        bars = axis.barh(names, speeds, xerr=spread, color=colours, ecolor="#333333", capsize=2)
        axis.bar_label(bars, [f"{speed:,.1f}" for speed in speeds], padding=6, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.set_title(case.title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("images/s", fontsize=9)
    return figure


def _memory(pyplot: Any, cases: dict[ModelCase, list[Line]]) -> Any:
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    series: dict[str, list[tuple[int, float]]] = {}
    for case, group in cases.items():
        for line in group:
            if line.row.peak_bytes:
                step = "training" if case.training else "inference"
                label = f"{line.row.contender}: {case.model}, {step}, {case.precision}"
                series.setdefault(label, []).append((case.batch, line.row.peak_bytes / 2**20))
    for label, points in series.items():
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xlabel("batch")
    axis.set_ylabel("peak MiB")
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return figure
