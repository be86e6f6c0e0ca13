"""`deit-fast check`: every operator on this machine, forward and backward, against float64 and stock PyTorch."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from deit_fast._extras import require
from deit_fast.check.cases import OPS
from deit_fast.check.environment import environment, interpreter_is_broken
from deit_fast.check.operators import SKIPPED, CheckLine, check
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels.launching.hardware import interpreted

if TYPE_CHECKING:
    from rich.console import Console


def add_parser(commands: Any) -> None:
    """Declare the subcommand and its arguments."""
    parser = commands.add_parser(
        "check",
        help="run every operator's kernels on this machine, on a GPU if there is one, and compare with stock PyTorch",
    )
    parser.add_argument(
        "--device", metavar="DEVICE", help="default: cuda where there is one, else cpu, in Triton's interpreter"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--op", action="append", choices=OPS, metavar="OP", help=f"only this one; may be repeated: {', '.join(OPS)}"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check, print and say in the exit code whether all is well: 0 or 1."""
    if not args.json:
        with user_input():
            require("rich", extra="cli")
    device = find_device(args.device)
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {device} cannot be checked: the kernels are for cuda (NVIDIA and AMD), or cpu")
    if device.type == "cuda" and interpreted():
        raise UserError("TRITON_INTERPRET is set, so nothing would run on the GPU: unset it, or take --device cpu")
    if device.type == "cpu" and interpreter_is_broken():
        raise UserError(
            "Triton 3.6's interpreter needs numpy before 2.4: install either a newer Triton or an older numpy"
        )
    if device.type == "cpu" and not interpreted():
        return run_interpreted(args)
    chosen = args.op or OPS
    return print_json(device, chosen) if args.json else print_tables(device, chosen)


def run_interpreted(args: argparse.Namespace) -> int:
    """The same in a process of its own, since Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "deit_fast.cli.main", "check", "--device", "cpu"]
    command += ["--json"] * args.json + [word for op in args.op or () for word in ("--op", op)]
    return subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode


def print_json(device: torch.device, chosen: tuple[str, ...]) -> int:
    lines = [line for _, group in check(device, chosen) for line in group]
    passed = not any(line.failure for line in lines)
    report = {
        "environment": environment(device),
        "passed": passed,
        "skipped": SKIPPED if interpreted() else {},
        "lines": [{**asdict(line), "outcome": line.outcome} for line in lines],
    }
    print(json.dumps(report, indent=2))
    return 0 if passed else 1


def print_tables(device: torch.device, chosen: tuple[str, ...]) -> int:
    """A table for each case as it comes, then the verdict."""
    from rich.console import Console

    console = Console(highlight=False)
    for name, value in environment(device).items():
        console.print(f"{name + ':':<10} {value}", markup=False, soft_wrap=True)
    if interpreted():
        console.print(
            "No GPU is checked here: small shapes show what the kernels compute, not what a GPU makes of it.",
            soft_wrap=True,
        )
        for dtype, reason in SKIPPED.items():
            console.print(f"{dtype} skipped: {reason}.")
    console.print("Relative errors against float64: the kernel's / the stock operator's.\n")

    lines: list[CheckLine] = []
    with console.status("") as status:
        for title, group in check(device, chosen, status.update):
            print_case(console, title, group)
            lines += group
    failed = [line for line in lines if line.failure]
    for reason in dict.fromkeys(reason for line in lines for reason in line.fallbacks):
        console.print(f"STOCK {reason}", style="yellow", markup=False, soft_wrap=True)
    for line in failed:
        console.print(f"FAILED {line}", style="red", markup=False, soft_wrap=True)
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(lines)} results failed.[/]")
        return 1
    console.print(
        f"All {len(lines)} results are as accurate as stock PyTorch's, and the same bits in a second run.",
        soft_wrap=True,
    )
    stock = sum(line.outcome == "stock" for line in lines)
    if stock:
        console.print(f"{stock} of them are of stock operators, for the reasons above.", soft_wrap=True)
    return 0


def print_case(console: "Console", title: str, lines: list[CheckLine]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    dtypes = list(dict.fromkeys(line.dtype for line in lines))
    cells = {(line.tensor, line.dtype): line for line in lines}
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for dtype in dtypes:
        table.add_column(dtype, min_width=17, no_wrap=True)
    for tensor in dict.fromkeys(line.tensor for line in lines):
        table.add_row(tensor, *(_cell(cells.get((tensor, dtype))) for dtype in dtypes))
    console.print(title, style="italic", soft_wrap=True)
    console.print(table)
    console.print()


def _cell(line: CheckLine | None) -> str:
    if line is None:
        return ""
    text = f"{line.error.relative:.1e} / {line.stock.relative:.1e}" if line.error and line.stock else ""
    if line.failure:
        return f"[red]{text or 'failed'} ✗[/]"
    return f"[yellow]{text} s[/]" if line.fallbacks else text
