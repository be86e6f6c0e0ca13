"""`deit-fast tune`: measures on this GPU what the kernels are launched with, and keeps what is fastest."""

import argparse
from typing import Any

import torch

from deit_fast._extras import require
from deit_fast.cli.cases import MODEL_SUITES, add_arguments, cases
from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels import launch, replay, tuned
from deit_fast.ops.backend import ran_out_of_memory

ROUNDS = 7


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "tune",
        help="measure the launch settings of a model's operators on this GPU and keep the fastest",
        description="For every operator of the models' steps, measures other launch settings and the stock operators "
        "beside the shipped ones, and writes the fastest to files that deit_fast reads from then on (in "
        "$DEIT_FAST_TUNED, or deit_fast/tuned in the user's cache). What spills registers is not measured.",
    )
    parser.add_argument("--suite", action="append", choices=MODEL_SUITES, help="default: both")
    add_arguments(parser, dtype="bfloat16", batch="64")
    parser.add_argument("--device", help="default: the GPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, write after every operator, and print."""
    with user_input():
        for module in ("timm", "rich"):
            require(module, extra="bench")
    from rich.console import Console

    from deit_fast.benchmark.clock import GpuClock

    device = find_device(args.device)
    if device.type != "cuda":
        raise UserError("tune measures a GPU, and there is none here: on a CPU the stock operators run")
    with user_input():
        found = cases(args, args.suite or MODEL_SUITES)
        writable_folder(tuned.folder(), "$DEIT_FAST_TUNED")
    console = Console(highlight=False)
    try:
        clock = GpuClock(device)
        for case in found:
            tune_case(case, device, clock, console, anew=True)
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured so far is kept.")
    console.print(f"Written to {tuned.folder()}", soft_wrap=True)
    return 0


def tune_case(case, device: torch.device, clock, console, anew: bool) -> None:
    """Tunes every operator of a step, and writes each as soon as it is measured.

    anew: also those that were tuned before.
    """
    from deit_fast.benchmark.operator_cases import operator_cases

    console.print(f"\n[bold]{case.title}[/]", soft_wrap=True)
    with console.status(f"{case.title}: its operators"):
        try:
            operators = operator_cases(case, device)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            console.print(f"Not tuned: out of memory at batch {case.batch}")
            return
    waiting = [each for each in operators if anew or not _was_tuned(each, device)]
    if len(waiting) < len(operators):
        found = f"{len(operators) - len(waiting)} of {len(operators)} operators"
        console.print(f"{found} are as they were tuned before, in {tuned.folder()}", soft_wrap=True)
    if waiting:
        _tune_operators(waiting, device, clock, console)


def _was_tuned(each, device: torch.device) -> bool:
    """Whether a file that is heeded here has its batch."""
    name, driver = launch.device_name(device), launch.driver_version()
    return each.batch in tuned.measured(each.operator.name, each.shape, name, driver)


def _tune_operators(operators: list, device: torch.device, clock, console) -> None:
    from rich.table import Table

    from deit_fast.benchmark.tune import tune

    table = Table("operator", "batch", "stock µs", "shipped µs", "tuned µs", "tried", "fastest", box=None)
    name, driver = launch.device_name(device), launch.driver_version()
    with console.status("") as status:
        for result in tune(operators, clock, ROUNDS, lambda what: status.update(f"tuning {what}")):
            operator = result.case
            if result.failure is None:
                tuned.write(operator.operator.name, operator.shape, name, driver, operator.batch, result.choice)
            times = [f"{1e6 * seconds:.1f}" for seconds in result.seconds.values()]
            table.add_row(
                f"{operator.operator.name} {operator.shape.replace(',', ' ')}",
                str(operator.batch),
                *(times or [""] * 3),
                str(result.tried),
                result.failure
                or ("stock" if result.choice.stock else "tuned" if result.choice.settings else "shipped"),
            )
    replay.forget()
    console.print(table)
