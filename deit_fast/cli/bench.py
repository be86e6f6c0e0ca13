"""`deit-fast bench`: what this machine makes of deit_fast, beside what one would use instead."""

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deit_fast._extras import require
from deit_fast.cli.cases import MODEL_SUITES, add_arguments, cases, choices
from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.cli.tune import tune_case
from deit_fast.kernels.launching.hardware import interpreted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from deit_fast.benchmark.contenders import ModelCase
    from deit_fast.benchmark.peaks import Peaks
    from deit_fast.benchmark.results import Results
    from deit_fast.benchmark.tasks import Measured

DEFAULT_OUT = "deit-fast-bench"
SUITES = (*MODEL_SUITES, "ops", "host")
# As shells report Ctrl-C.
_INTERRUPTED = 130


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "bench",
        help="time stock and swapped models beside each other on this machine",
        description="Checks every contender against float64, then times them in rounds, in which each has its turn. "
        "Writes results.json, results.csv, results.md and plots.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all; may be given more than once")
    add_arguments(parser)
    parser.add_argument("--peers", metavar="NAMES", help="separated by ';'; default: all there are for this device")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--measure-peaks", action="store_true", help="of this device, in place of its data sheet's")
    parser.add_argument("--no-tune", action="store_true", help="on a GPU: measure 'deit_fast, tuned' as it was tuned")
    parser.add_argument("--profile", action="store_true", help="on a GPU: where deit_fast's steps spend their time")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--out", default=DEFAULT_OUT, metavar="DIR", help="default: %(default)s")
    parser.set_defaults(run=run)

    actions = parser.add_subparsers(dest="action", metavar="[compare A.json B.json]")
    compare = actions.add_parser("compare", help="what changed from one run to another beyond noise")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(run=run_compare)


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 where a contender computes something else than its stock model, or nothing was measured."""
    with user_input():
        for module in ("timm", "rich", "matplotlib"):
            require(module, extra="bench")
    from rich.console import Console

    from deit_fast.benchmark.provenance import provenance
    from deit_fast.benchmark.results import Results

    device = find_device(args.device)
    with user_input():
        suites = args.suite or SUITES
        found = cases(args, suites)
        of_operators = cases(args, MODEL_SUITES) if "ops" in suites else []
        contenders, skipped = _contenders(args.peers, device)
        if found and not contenders:
            raise ValueError(f"--peers: none can be measured here: {_listed(skipped)}")
        if "host" in suites and interpreted():
            raise ValueError("--suite host times launches, which TRITON_INTERPRET replaces: unset it")
        if args.profile and device.type != "cuda":
            raise ValueError("--profile shows a GPU's kernels, and there is none here")
        if args.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
        _refuse_unsupported(dict.fromkeys(case.model for case in found + of_operators))
        _refuse_to_overwrite(Path(args.out))
        out = writable_folder(args.out)
    environment = provenance(device, _packages(contenders if found else [], device, "ops" in suites))
    results = Results(environment, [], peaks=_peaks(args, found + of_operators, device))
    console = Console(highlight=False)
    if found and skipped:
        results.unmeasured |= skipped
        console.print(f"Not measured: {_listed(skipped)}", soft_wrap=True)

    interrupted = False
    try:
        tunes = device.type == "cuda" and not args.no_tune and any(contender.tuned for contender in contenders)
        for case in dict.fromkeys(found + of_operators) if tunes else ():
            with _noting(case, "tuning", results, console):
                tune_case(case, device, console, anew=False)
        with _progress(console) as progress:
            session = _Session(console, progress, device, args.rounds, results, out)
            session.run(found, contenders, of_operators, found if args.profile else [], "host" in suites)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted: what was measured so far is written.")
    _write(results, out, console)
    return _INTERRUPTED if interrupted else _exit_code(results, console)


def _write(results: "Results", out: Path, console: "Console") -> None:
    from deit_fast.benchmark import plots
    from deit_fast.benchmark.results import markdown, write_csv

    results.write(out / "results.json")
    (out / "results.md").write_text(markdown(results, plots.write_plots(results, out)))
    write_csv(results, out / "results.csv")
    console.print(f"Written to {out}/: {', '.join(sorted(file.name for file in out.iterdir()))}", soft_wrap=True)


def _exit_code(results: "Results", console: "Console") -> int:
    rows: list[Any] = [*results.rows, *results.operators]
    if not results.host and not any(row.seconds for row in rows):
        console.print("Nothing could be measured.")
        return 1
    return int(any((row.failure or "").startswith("ArithmeticError") for row in rows))


def _progress(console: "Console") -> "Progress":
    """A bar, how much of how much, the time that remains, and what is being done, as far as it fits."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    what = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), what)
    return Progress(*columns, console=console, transient=True, expand=True, speed_estimate_period=3600)


@dataclass
class _Session:
    """What the suites share. Each of their cases is a unit of the bar, and all there is is written after it."""

    console: Any
    progress: Any
    device: torch.device
    rounds: int
    results: Any
    out: Path

    def run(self, found: list, contenders: list, of_operators: list, to_profile: list, host: bool) -> None:
        from deit_fast.benchmark.tasks import Measured, measure_task, runner

        names = tuple(contender.name for contender in contenders)
        tasks = [
            *(Measured("models", case, self.device, self.rounds, names) for case in found),
            *(Measured("operators", case, self.device, self.rounds) for case in of_operators),
            *(Measured("profile", case, self.device) for case in to_profile),
        ]
        self.task = self.progress.add_task("", total=len(tasks) + host)
        try:
            for number, done in enumerate(runner(self.device)(measure_task, tasks, self._heard), start=1):
                if done.failure is not None:
                    self._not_measured(done.task, done.failure)
                self._print(done.task)
                self._completed(number)
        finally:
            self.results.write(self.out / "results.json")
        if host:
            self._host()
            self._completed(len(tasks) + 1)

    def _completed(self, units: int) -> None:
        self.progress.update(self.task, completed=units)
        self.results.write(self.out / "results.json")

    def _heard(self, task: "Measured", told: tuple[str, Any]) -> None:
        kind, content = told
        if kind == "say":
            # A model's case is checked, warmed up and timed in rounds.
            part = 1 / (len(task.contenders) * (2 + task.rounds)) if task.what == "models" else 0.0
            self._say(content, part)
        elif kind == "row":
            self.results.rows.append(content)
        elif kind == "operator":
            self.results.operators.append(content)
        elif kind == "kernels":
            self.results.kernels[task.case.title] = content
        else:
            self._not_measured(task, content)

    def _not_measured(self, task: "Measured", reason: str) -> None:
        self.results.unmeasured[task.title] = reason
        self.console.print(f"Not measured: {task.title}: {reason}", markup=False, soft_wrap=True)

    def _print(self, task: "Measured") -> None:
        if task.title in self.results.unmeasured:
            return
        if task.what == "models":
            _print_models(self.console, task.case, self.results)
        elif task.what == "operators":
            _print_operators(self.console, task.case, self.results)

    def _say(self, what: str, part: float = 0.0) -> None:
        self.progress.update(self.task, description=what, advance=part)

    def _host(self) -> None:
        from deit_fast.benchmark import host

        self._say("host time")
        self.results.host = host.host_times()
        self.console.print(host.table(self.results.host), markup=False)


@contextmanager
def _noting(case: "ModelCase", what: str, results: "Results", console: "Console") -> Iterator[None]:
    """Where the block fails, that is noted in the results and said: the run goes on."""
    from deit_fast.benchmark.measure import noted

    def note(reason: str) -> None:
        results.unmeasured[f"{case.title}: {what}"] = reason
        console.print(f"Not measured: {case.title}: {what}: {reason}", markup=False, soft_wrap=True)

    with noted(case, note):
        yield


def _listed(unmeasured: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in unmeasured.items())


def run_compare(args: argparse.Namespace) -> int:
    """Print what changed; 1 where something is slower beyond noise."""
    from deit_fast.benchmark.results import Results, compare

    with user_input():
        before, after = Results.read(args.before), Results.read(args.after)
    found = compare(before, after)
    if not found:
        raise UserError(f"{args.before} and {args.after} have no measurement in common")
    # A CPU's load is no other device.
    devices = [each.environment.get("device", "unknown").partition("; load average")[0] for each in (before, after)]
    if devices[0] != devices[1]:
        print(f"Measured on different devices: {devices[0]}; {devices[1]}")
    for what, contender, ratio, verdict in found:
        print(f"{verdict:12} {ratio:5.2f}x  {contender}: {what}")
    return int(any(verdict == "slower" for *_, verdict in found))


def _contenders(names: str | None, device: torch.device) -> tuple[list, dict[str, str]]:
    """Those to measure, and those asked for that can't be measured here → why."""
    from deit_fast.benchmark.contenders import CONTENDERS

    chosen = list(CONTENDERS) if names is None else choices("--peers", names, CONTENDERS, separator=";")
    reasons = {name: CONTENDERS[name].missing(device) for name in chosen}
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return [CONTENDERS[name] for name in chosen if name not in skipped], skipped


def _packages(contenders: list, device: torch.device, operators: bool) -> set[str]:
    """Other libraries that take part, where they are installed."""
    from deit_fast.benchmark.operators import PEERS

    of_operators = {package for peers in PEERS.values() for _, package, _ in peers}
    of_models = {package for contender in contenders for package in contender.packages}
    return {"timm"} | of_models | (of_operators if operators and device.type == "cuda" else set())


def _refuse_unsupported(models: Iterable[str]) -> None:
    """
    Raises:
        ValueError: a model of timm is none that deit_fast replaces.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    for name in models:
        with torch.device("meta"):
            model = timm.create_model(name)
        if not isinstance(model, VisionTransformer):
            kind = type(model).__name__
            raise ValueError(f"--models: {name} is a {kind}; supported: timm's VisionTransformer (deit, deit3, vit)")


def _refuse_to_overwrite(out: Path) -> None:
    """
    Raises:
        ValueError: the folder holds what another command measured.
    """
    from deit_fast.benchmark.provenance import command
    from deit_fast.benchmark.results import Results

    file = out / "results.json"
    if file.exists() and Results.read(file).environment.get("command") != command():
        raise ValueError(f"--out {out} holds the results of another command: give another folder, or move them away")


def _peaks(args: argparse.Namespace, found: list["ModelCase"], device: torch.device) -> "Peaks | None":
    from deit_fast.benchmark import peaks
    from deit_fast.benchmark.tasks import clock_of

    if not args.measure_peaks:
        return peaks.published(device)
    return peaks.measured(device, sorted({case.amp or case.dtype for case in found}), clock_of(device))


def _print_operators(console: "Console", case: "ModelCase", results: "Results") -> None:
    """What fits a terminal; the page has the rest."""
    from rich.table import Table

    from deit_fast.benchmark import operator_results

    rows = operator_results.by_case(results.operators)[case]
    table = Table("operator", "of", "contender", "µs a call", "faster", "than the best peer", "roofline", box=None)
    for row in rows:
        _, contender, time, faster, best, _, _, roofline, _ = operator_results.cells(row, rows, results.peaks)
        weights = [part for part in row.shape.split(",") if "weight" in part and "=" in part]
        of = (weights or row.shape.split(","))[0].partition("=")[2]
        ratios = (each.partition(" ")[0] for each in (faster, best))
        table.add_row(f"{row.times} × {row.operator}", of, contender, time.partition(" (")[0], *ratios, roofline)
    _print_table(console, f"Operators: {case.title}", table, rows)


def _print_models(console: "Console", case: "ModelCase", results: "Results") -> None:
    """What fits a terminal; the page has the rest."""
    from rich.table import Table

    from deit_fast.benchmark.results import HEADER, by_case, cells

    columns = ("contender", "images/s", "times faster than", "than the best peer", "error")
    shown = [HEADER.index(name) for name in columns]
    table = Table(*columns, box=None)
    lines = by_case(results.rows)[case]
    for line in lines:
        found = cells(line, results.peaks)
        table.add_row(*(found[i] for i in shown))
    _print_table(console, case.title, table, [line.row for line in lines])


def _print_table(console: "Console", title: str, table: "Table", rows: list) -> None:
    from deit_fast.benchmark.tables import remarks

    console.print(f"\n[bold]{title}[/]", soft_wrap=True)
    console.print(table)
    for remark in remarks(rows):
        console.print(remark, markup=False, soft_wrap=True)
