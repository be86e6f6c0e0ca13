"""`deit-fast bench`: what this machine makes of deit_fast, beside what one would use instead."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from deit_fast._extras import require
from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels.launch import interpreted

DEFAULT_OUT = "deit-fast-bench"
SUITES = ("model", "train", "host")
MODELS = ("deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224")
PRECISIONS = ("float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "bench",
        help="time stock and swapped models beside each other on this machine",
        description="Checks every contender against float64, then times them in rounds, in which each has its turn. "
        "Writes results.json, results.csv, results.md and plots.",
    )
    parser.add_argument("--suite", action="append", choices=SUITES, help="default: all; may be given more than once")
    parser.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="of timm; default: %(default)s")
    parser.add_argument("--batch", default="1,8,16", metavar="SIZES", help="default: %(default)s")
    parser.add_argument("--img-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--dtype", default="float32", metavar="TYPES", help=f"of the model: {', '.join(PRECISIONS)}")
    parser.add_argument("--amp", default="", metavar="TYPES", help="autocast of a float32 model: bfloat16, float16")
    parser.add_argument("--drop-path", type=float, metavar="RATE", help="in training; default: that of the recipe")
    parser.add_argument("--peers", metavar="NAMES", help="separated by ';'; default: all there are for this device")
    parser.add_argument("--rounds", type=int, default=9)
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
    from deit_fast.benchmark.provenance import provenance
    from deit_fast.benchmark.results import Results, markdown, write_csv

    device = find_device(args.device)
    with user_input():
        cases = _cases(args)
        contenders = _contenders(args.peers)
        if "host" in (args.suite or SUITES) and interpreted():
            raise ValueError("--suite host times launches, which TRITON_INTERPRET replaces: unset it")
        if args.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
        out = writable_folder(args.out)
    clock = GpuClock(device) if device.type == "cuda" else CpuClock()
    # On a GPU stock convolutions use TF32 unless told otherwise, and would look less right and faster than they are.
    torch.backends.cudnn.allow_tf32 = False
    results = Results(provenance(device), [])

    from rich.console import Console

    console = Console(highlight=False)
    with _interruptible(console), console.status("") as status:
        for case in cases:
            _measure(case, contenders, device, clock, args.rounds, status.update, results, out)
            _print(console, case, results)
        if "host" in (args.suite or SUITES):
            status.update("host time")
            results.host = host.host_times()
            console.print(host.table(results.host), markup=False)
    results.write(out / "results.json")
    (out / "results.md").write_text(markdown(results, plots.write_plots(results, out)))
    write_csv(results, out / "results.csv")
    console.print(f"Written to {out}/: {', '.join(sorted(file.name for file in out.iterdir()))}", soft_wrap=True)
    return int(any(row.failure and row.failure.startswith("ArithmeticError") for row in results.rows))


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


def _cases(args: argparse.Namespace) -> list:
    """Of the suites that time models.

    Raises:
        ValueError: an argument that nothing fits.
    """
    import timm

    from deit_fast.benchmark.contenders import Case, recipe_drop_path

    suites = args.suite or SUITES
    models = _choices("--models", args.models, timm.list_models())
    dtypes = _choices("--dtype", args.dtype, PRECISIONS)
    amps = _choices("--amp", args.amp, PRECISIONS[1:]) if args.amp else []
    batches = [int(size) if size.isdigit() else 0 for size in args.batch.split(",")]
    if min(batches) < 1:
        raise ValueError(f"--batch must be sizes of at least 1, separated by ',', got {args.batch}")
    if args.drop_path is not None and not 0 <= args.drop_path < 1:
        raise ValueError(f"--drop-path must be in [0, 1), got {args.drop_path}")
    cases = []
    for model in models:
        for dtype, amp in [*((dtype, None) for dtype in dtypes), *(("float32", amp) for amp in amps)]:
            for batch in batches:
                case = Case(model, batch, args.img_size, dtype, amp)
                if "model" in suites:
                    cases.append(case)
                # Nobody trains in float16 alone: small updates would vanish in its weights.
                if "train" in suites and dtype != "float16":
                    rate = recipe_drop_path(model) if args.drop_path is None else args.drop_path
                    cases.append(replace(case, training=True, drop_path=rate))
    return cases


def _contenders(names: str | None) -> list:
    from deit_fast.benchmark.contenders import CONTENDERS

    if names is None:
        return list(CONTENDERS.values())
    return [CONTENDERS[name] for name in _choices("--peers", names, CONTENDERS, separator=";")]


def _choices(option: str, text: str, known, separator: str = ",") -> list[str]:
    names = [name.strip() for name in text.split(separator) if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        listed = "; ".join(known) if len(known) < 20 else "timm.list_models() has them"
        raise ValueError(f"{option}: unknown {', '.join(unknown) or '(none given)'}; known: {listed}")
    return names


def _measure(case, contenders, device, clock, rounds: int, say: Callable[[str], None], results, out: Path) -> None:
    """Adds the case's rows and writes all there are, also when it is interrupted."""
    from deit_fast.benchmark.measure import measure

    # A peer for GPUs has no place in a CPU's table.
    fitting = [contender for contender in contenders if device.type == "cuda" or not contender.gpu_only]
    for row in measure(case, fitting, device, clock, rounds, lambda what: say(f"{case.title}: {what}")):
        results.rows.append(row)
    results.write(out / "results.json")


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
        found = cells(line)
        table.add_row(*(found[i] for i in shown))
    console.print(f"\n[bold]{case.title}[/]", soft_wrap=True)
    console.print(table)
