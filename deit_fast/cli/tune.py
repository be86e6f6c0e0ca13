"""`deit-fast tune`: measures on this GPU what the kernels are launched with, and keeps what is fastest."""

import argparse
from typing import TYPE_CHECKING, Any

import torch

from deit_fast._extras import require
from deit_fast.cli.cases import MODEL_SUITES, add_arguments, cases
from deit_fast.cli.demo import writable_folder
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels.launching import hardware, replay, tuned

if TYPE_CHECKING:
    from rich.console import Console

    from deit_fast.benchmark.contenders import ModelCase
    from deit_fast.benchmark.tasks import Listed

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

    device = find_device(args.device)
    if device.type != "cuda":
        raise UserError("tune measures a GPU, and there is none here: on a CPU the stock operators run")
    with user_input():
        found = cases(args, args.suite or MODEL_SUITES)
        writable_folder(tuned.folder(), "$DEIT_FAST_TUNED")
    console = Console(highlight=False)
    try:
        for case in found:
            tune_case(case, device, console, anew=True)
    except KeyboardInterrupt:
        console.print("Interrupted: what was measured so far is kept.")
    console.print(f"Written to {tuned.folder()}", soft_wrap=True)
    return 0


def tune_case(case: "ModelCase", device: torch.device, console: "Console", anew: bool) -> None:
    """Tunes every operator of a step, and writes each as soon as it is measured.

    anew: also those that were tuned before.
    """
    from deit_fast.benchmark.tasks import Tuning, runner, tune_task

    console.print(f"\n[bold]{case.title}[/]", soft_wrap=True)
    with console.status(f"{case.title}: its operators"):
        (listed,) = runner(device)(tune_task, [Tuning(case, device, ROUNDS)])
    if listed.failure is not None:
        console.print(f"Not tuned: {listed.failure}", markup=False, soft_wrap=True)
        return
    waiting = [each for each in listed.result if anew or not _was_tuned(each, device)]
    if len(waiting) < len(listed.result):
        found = f"{len(listed.result) - len(waiting)} of {len(listed.result)} operators"
        console.print(f"{found} are as they were tuned before, in {tuned.folder()}", soft_wrap=True)
    if waiting:
        _tune_operators(case, waiting, device, console)


def _was_tuned(each: "Listed", device: torch.device) -> bool:
    """Whether a file that is heeded here has its batch."""
    name, driver = hardware.device_name(device), hardware.driver_version()
    return each.batch in tuned.measured(each.operator, each.shape, name, driver)


def _tune_operators(case: "ModelCase", waiting: list["Listed"], device: torch.device, console: "Console") -> None:
    from rich.table import Table

    from deit_fast.benchmark.candidates import kernels_chosen
    from deit_fast.benchmark.tasks import Tuning, runner, tune_task

    table = Table("operator", "batch", "stock µs", "shipped µs", "tuned µs", "tried", "fastest", box=None)
    name, driver = hardware.device_name(device), hardware.driver_version()
    tasks = [Tuning(case, device, ROUNDS, each.place) for each in waiting]
    with console.status("") as status:
        for each, done in zip(
            waiting, runner(device)(tune_task, tasks, lambda _, what: status.update(f"tuning {what}")), strict=True
        ):
            of = f"{each.operator} {each.shape.replace(',', ' ')}", str(each.batch)
            if done.failure is not None:
                table.add_row(*of, "", "", "", "", done.failure)
                continue
            found = done.result
            tuned.write(each.operator, each.shape, name, driver, each.batch, found.choice)
            fastest = "stock" if found.choice.stock else "tuned" if found.choice.settings else "shipped"
            fastest = ", ".join([fastest, *kernels_chosen(found.choice.settings)])
            table.add_row(*of, *(f"{1e6 * each:.1f}" for each in found.seconds.values()), str(found.tried), fastest)
    replay.forget()
    console.print(table)
