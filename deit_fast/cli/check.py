"""`deit-fast check`: every operator on this machine, forward and backward, against float64 and stock PyTorch."""

import argparse
import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deit_fast._extras import require
from deit_fast.benchmark.workers import Done, Failed, Tell, make_current, run_tasks, run_tasks_here
from deit_fast.cli.accuracy import Errors, allowed_errors, errors, same_specials, within
from deit_fast.cli.check_cases import DEIT_SIZES, INTERPRETER_SIZES, OPS, Case, Size, cases, of_size
from deit_fast.cli.check_environment import environment
from deit_fast.cli.errors import UserError, user_input
from deit_fast.cli.predict import find_device
from deit_fast.kernels import tf32
from deit_fast.kernels.launch import interpreted
from deit_fast.ops import backend

if TYPE_CHECKING:
    from rich.console import Console

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETER_DTYPES = (torch.float32, torch.float16)
SKIPPED = {"bfloat16": "Triton's interpreter computes bfloat16 wrongly"}


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


@dataclass(frozen=True)
class Line:
    """One output or gradient of one case: errors against float64, and why it fails, or None.

    fallbacks: where stock operators answered, by design, for what the kernels can't do here.
    """

    op: str
    case: str
    dtype: str
    tensor: str
    error: Errors | None = None
    stock: Errors | None = None
    allowed: Errors | None = None
    failure: str | None = None
    traceback: str | None = None
    fallbacks: tuple[str, ...] = ()

    @property
    def outcome(self) -> str:
        if self.failure:
            return "failed"
        return "stock" if self.fallbacks else "passed"

    def __str__(self) -> str:
        return f"{self.op} ({self.case}), {self.dtype}, {self.tensor}: {self.failure}"


@dataclass(frozen=True)
class Task:
    """The cases of one operator at one size in one dtype."""

    op: str
    size: Size
    dtype: torch.dtype
    device: torch.device


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
    if device.type == "cpu" and _interpreter_is_broken():
        raise UserError(
            "Triton 3.6's interpreter needs numpy before 2.4: install either a newer Triton or an older numpy"
        )
    if device.type == "cpu" and not interpreted():
        return run_interpreted(args)
    chosen = args.op or OPS
    return print_json(device, chosen) if args.json else print_tables(device, chosen)


def _interpreter_is_broken() -> bool:
    """Whether a tensor as a loop bound would be an error in it."""
    triton_version, numpy_version = (
        tuple(map(int, version(package).split(".")[:2])) for package in ("triton", "numpy")
    )
    return triton_version < (3, 7) and numpy_version >= (2, 4)


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

    lines: list[Line] = []
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


def print_case(console: "Console", title: str, lines: list[Line]) -> None:
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


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    text = f"{line.error.relative:.1e} / {line.stock.relative:.1e}" if line.error else ""
    if line.failure:
        return f"[red]{text or 'failed'} ✗[/]"
    return f"[yellow]{text} s[/]" if line.fallbacks else text


def check(
    device: torch.device, chosen: tuple[str, ...], progress: Callable[[str], None] = lambda title: None
) -> Iterator[tuple[str, list[Line]]]:
    """The title and the lines, in every dtype, of each case of the operators `chosen`; `progress` gets titles."""
    sizes, dtypes = (INTERPRETER_SIZES, INTERPRETER_DTYPES) if interpreted() else (DEIT_SIZES, DTYPES)
    # By title, since the width makes no difference to some.
    different = {(op, of_size(op, size)): (op, size) for op in chosen for size in sizes}
    tasks = [Task(op, size, dtype, device) for op, size in different.values() for dtype in dtypes]
    # A GPU that one case breaks answers none after it in the same process.
    run = run_tasks if device.type == "cuda" else run_tasks_here
    found: dict[str, list[Line]] = {}
    for done in run(check_task, tasks, lambda task, title: progress(title)):
        for line in answered(done):
            found.setdefault(f"{line.op}: {line.case}", []).append(line)
        if done.task.dtype is dtypes[-1]:
            yield from found.items()
            found.clear()


def answered(done: Done) -> list[Line]:
    """A task's lines; one for all where its process did not come to an end."""
    if not isinstance(done.result, Failed):
        return done.result
    task = done.task
    about = (task.op, of_size(task.op, task.size), _name(task.dtype), "all of it")
    return [Line(*about, failure=done.result.reason, traceback=done.result.printed)]


def check_task(task: Task, tell: Tell) -> list[Line]:
    """The lines of all its cases, titles told as they begin."""
    make_current(task.device)
    # On a GPU stock convolutions use TF32 unless told otherwise.
    tf32.forbid_in_convolutions()
    lines: list[Line] = []
    for case in cases(task.op, task.size, task.dtype, task.device):
        tell(f"{case.op}: {case.title}, {_name(task.dtype)}")
        lines += check_case(case, task.dtype)
    return lines


def check_case(case: Case, dtype: torch.dtype) -> list[Line]:
    """A line for each output and gradient; one for all where an exception ends the case."""
    about = (case.op, case.title, _name(dtype))
    try:
        # Stock operators may answer for what the kernels don't claim to do, but not for kernels that fail.
        with warnings.catch_warnings(), backend.fallbacks() as fallbacks:
            warnings.filterwarnings("ignore", message=r"deit_fast.*; using the stock PyTorch operators")
            for fault in ("its kernels failed", "its launches could not be repeated", ".* does not run with what was"):
                warnings.filterwarnings("error", message=rf"deit_fast\S* {fault}")
            warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
            ours, again = (evaluate(case, dtype, "triton") for _ in range(2))
        failed = [message for message, by_design in fallbacks.items() if not by_design]
        if failed:  # and was warned of before
            return [Line(*about, "all of it", failure="; ".join(failed))]
        stock = evaluate(case, dtype, "torch")
        exact = evaluate(case, dtype, "torch", double=True)
        return [
            Line(
                *about,
                name,
                **compare(ours[name], again[name], stock[name], exact[name].double()),
                fallbacks=tuple(fallbacks),
            )
            for name in exact
        ]
    except Exception as error:
        if backend.device_error(error, next(t.device for t in case.arguments.values() if isinstance(t, Tensor))):
            raise
        # Of a fallback, what it fell back from.
        cause = error.__context__ if isinstance(error, UserWarning) and error.__context__ else error
        whole = "".join(traceback.format_exception(error))
        return [Line(*about, "all of it", failure=backend.in_a_line(cause), traceback=whole)]


def evaluate(case: Case, dtype: torch.dtype, chosen: str, double: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients by name, of the backend `chosen`; with `double` in float64, of the same inputs."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if double and tensor.is_floating_point() else tensor

    arguments = {n: widened(a).detach() if isinstance(a, Tensor) else a for n, a in case.arguments.items()}
    wanted = [arguments[name].requires_grad_() for name in case.differentiable]
    with backend.forced(chosen), torch.set_grad_enabled(not case.inference):
        outputs = case.function(**arguments)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        found = {f"output {i}" if len(outputs) > 1 else "output": o.detach() for i, o in enumerate(outputs)}
        if wanted:
            generator = torch.Generator().manual_seed(1)
            differentiable = [o for o in outputs if o.requires_grad]
            weights = [
                widened(torch.randn(o.shape, generator=generator).to(o.device, dtype)).to(o.dtype)
                for o in differentiable
            ]
            gradients = torch.autograd.grad(differentiable, wanted, weights)
            found |= {f"d {name}": g for name, g in zip(case.differentiable, gradients, strict=True)}
    return found


def compare(ours: Tensor, again: Tensor, stock: Tensor, exact: Tensor) -> dict[str, Any]:
    """The fields of a line: errors, and what is wrong."""
    if ours.dtype != stock.dtype or ours.shape != stock.shape:
        return {"failure": f"{ours.dtype} {list(ours.shape)} where stock has {stock.dtype} {list(stock.shape)}"}
    found = {"error": errors(ours, exact), "stock": errors(stock, exact)}
    if not same_specials(ours, stock, exact).all():
        return {**found, "failure": "other NaN or infinity than float64"}
    if stock.is_floating_point():
        found["allowed"] = allowed_errors(found["stock"], exact, stock.dtype)
        right = within(found["error"], found["allowed"], exact.numel())
    else:
        found["allowed"], right = Errors(0.0, 0.0), torch.equal(ours, stock)
    if not right:
        return {**found, "failure": _less_accurate(**found)}
    if not torch.equal(ours.nan_to_num(), again.nan_to_num()):
        return {**found, "failure": "other bits in a second run"}
    return found


def _less_accurate(error: Errors, stock: Errors, allowed: Errors) -> str:
    return (
        f"less accurate than stock: relative error {error.relative:.2g} (stock {stock.relative:.2g}, allowed "
        f"{allowed.relative:.2g}), largest {error.largest:.2g} (stock {stock.largest:.2g}, allowed "
        f"{allowed.largest:.2g})"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
