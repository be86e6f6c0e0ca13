"""`deit-fast bench`: what this machine makes of deit_fast, beside what one would use instead."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from deit_fast._extras import require
from deit_fast.cli.cases import MODEL_SUITES, add_arguments, cases, choices
from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.cli.tune import tune_case
from deit_fast.kernels.launch import interpreted

DEFAULT_OUT = "deit-fast-bench"
SUITES = (*MODEL_SUITES, "ops", "host")


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
    """Measure and write; 1 where a contender computes something else than its stock model."""
    with user_input():
        for module in ("timm", "rich", "matplotlib"):
            require(module, extra="bench")
    from deit_fast.benchmark import host, plots
    from deit_fast.benchmark.clock import CpuClock, GpuClock
    from deit_fast.benchmark.contenders import CONTENDERS
    from deit_fast.benchmark.measure import Step
    from deit_fast.benchmark.profile import profiled
    from deit_fast.benchmark.provenance import provenance
    from deit_fast.benchmark.results import Results, markdown, write_csv

    device = find_device(args.device)
    with user_input():
        suites = args.suite or SUITES
        found = cases(args, suites)
        of_operators = cases(args, MODEL_SUITES) if "ops" in suites else []
        contenders = _contenders(args.peers)
        if "host" in suites and interpreted():
            raise ValueError("--suite host times launches, which TRITON_INTERPRET replaces: unset it")
        if args.profile and device.type != "cuda":
            raise ValueError("--profile shows a GPU's kernels, and there is none here")
        if args.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
        out = writable_folder(args.out)
    clock = GpuClock(device) if device.type == "cuda" else CpuClock()
    # On a GPU stock convolutions use TF32 unless told otherwise, and would look less right and faster than they are.
    torch.backends.cudnn.allow_tf32 = False
    results = Results(provenance(device), [], peaks=_peaks(args, found + of_operators, device, clock))

    from rich.console import Console

    console = Console(highlight=False)
    with _interruptible(console):
        tunes = device.type == "cuda" and not args.no_tune and any(contender.tuned for contender in contenders)
        for case in dict.fromkeys(found + of_operators) if tunes else ():
            tune_case(case, device, clock, console)
    with _interruptible(console), console.status("") as status:
        for case in found:
            _measure(case, contenders, device, clock, args.rounds, status.update, results, out)
            _print(console, case, results)
        for case in of_operators:
            _measure_operators(case, device, clock, args.rounds, status.update, results, out)
            console.print(f"\n[bold]Operators: {case.title}[/]", soft_wrap=True)
            console.print(_operator_table(case, results))
        for case in found if args.profile else ():
            status.update(f"{case.title}: profile")
            step = Step(CONTENDERS["deit_fast"].prepare(case, device), case, device, case.batch)
            results.kernels[case.title] = profiled(step)
        if "host" in suites:
            status.update("host time")
            results.host = host.host_times()
            console.print(host.table(results.host), markup=False)
    results.write(out / "results.json")
    (out / "results.md").write_text(markdown(results, plots.write_plots(results, out)))
    write_csv(results, out / "results.csv")
    console.print(f"Written to {out}/: {', '.join(sorted(file.name for file in out.iterdir()))}", soft_wrap=True)
    wrong = [row for row in (*results.rows, *results.operators) if (row.failure or "").startswith("ArithmeticError")]
    return int(bool(wrong))


def run_compare(args: argparse.Namespace) -> int:
    """Print what changed; 1 where something is slower beyond noise."""
    from deit_fast.benchmark.results import Results, compare

    with user_input():
        found = compare(Results.read(args.before), Results.read(args.after))
    if not found:
        raise UserError(f"{args.before} and {args.after} have no measurement in common")
    for case, contender, ratio, verdict in found:
        print(f"{verdict:12} {ratio:5.2f}x  {contender}: {case}")
    return int(any(verdict == "slower" for *_, verdict in found))


def _contenders(names: str | None) -> list:
    from deit_fast.benchmark.contenders import CONTENDERS

    if names is None:
        return list(CONTENDERS.values())
    return [CONTENDERS[name] for name in choices("--peers", names, CONTENDERS, separator=";")]


def _peaks(args: argparse.Namespace, found: list, device: torch.device, clock):
    from deit_fast.benchmark import peaks

    if not args.measure_peaks:
        return peaks.published(device)
    return peaks.measured(device, sorted({case.amp or case.dtype for case in found}), clock)


def _measure(case, contenders, device, clock, rounds: int, say: Callable[[str], None], results, out: Path) -> None:
    """Adds the case's rows and writes all there are, also when it is interrupted."""
    from deit_fast.benchmark.measure import measure

    # A peer for GPUs has no place in a CPU's table.
    fitting = [contender for contender in contenders if device.type == "cuda" or not contender.gpu_only]
    for row in measure(case, fitting, device, clock, rounds, lambda what: say(f"{case.title}: {what}")):
        results.rows.append(row)
    results.write(out / "results.json")


def _measure_operators(case, device, clock, rounds: int, say: Callable[[str], None], results, out: Path) -> None:
    """Adds the rows of the case's operators and writes all there are."""
    from deit_fast.benchmark.operators import measure_operators

    for row in measure_operators(case, device, clock, rounds, lambda what: say(f"{case.title}: {what}")):
        results.operators.append(row)
    results.write(out / "results.json")


def _operator_table(case, results):
    """What fits a terminal; the page has the rest."""
    from rich.table import Table

    from deit_fast.benchmark import operator_results

    rows = operator_results.by_case(results.operators)[case]
    table = Table("operator", "of", "contender", "µs a call", "faster", "roofline", box=None)
    for row in rows:
        _, contender, time, faster, _, _, roofline, _ = operator_results.cells(row, rows, results.peaks)
        weights = [part for part in row.shape.split(",") if "weight" in part and "=" in part]
        of = (weights or row.shape.split(","))[0].partition("=")[2]
        table.add_row(
            f"{row.times} × {row.operator}", of, contender, time.partition(" (")[0], faster.partition(" ")[0], roofline
        )
    return table


@contextmanager
def _interruptible(console) -> Iterator[None]:
    """Ctrl-C ends the measuring; what is measured is still written."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("Interrupted: only the cases measured so far are written.")


def _print(console, case, results) -> None:
    """What fits a terminal; the page has the rest."""
    from rich.table import Table

    from deit_fast.benchmark.results import HEADER, by_case, cells

    shown = [HEADER.index(name) for name in ("contender", "images/s", "times faster than", "error")]
    table = Table(*(HEADER[i] for i in shown), box=None)
    for line in by_case(results.rows)[case]:
        found = cells(line, results.peaks)
        table.add_row(*(found[i] for i in shown))
    console.print(f"\n[bold]{case.title}[/]", soft_wrap=True)
    console.print(table)
