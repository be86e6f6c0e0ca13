"""Every operator on a device, forward and backward, against float64 and stock PyTorch."""

import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deit_fast.check.accuracy import Errors, allowed_errors, errors, same_specials, within
from deit_fast.check.cases import DEIT_SIZES, INTERPRETER_SIZES, CheckCase, Size, cases, of_size
from deit_fast.check.workers import Done, Failed, Tell, make_current, run_tasks, run_tasks_here
from deit_fast.kernels.launching import tf32
from deit_fast.kernels.launching.hardware import interpreted
from deit_fast.ops import backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETER_DTYPES = (torch.float32, torch.float16)
SKIPPED = {"bfloat16": "Triton's interpreter computes bfloat16 wrongly"}


@dataclass(frozen=True)
class CheckLine:
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
class CheckTask:
    """The cases of one operator at one size in one dtype."""

    op: str
    size: Size
    dtype: torch.dtype
    device: torch.device


def check(
    device: torch.device, chosen: tuple[str, ...], progress: Callable[[str], None] = lambda title: None
) -> Iterator[tuple[str, list[CheckLine]]]:
    """The title and the lines, in every dtype, of each case of the operators `chosen`; `progress` gets titles."""
    sizes, dtypes = (INTERPRETER_SIZES, INTERPRETER_DTYPES) if interpreted() else (DEIT_SIZES, DTYPES)
    # By title, since the width makes no difference to some.
    different = {(op, of_size(op, size)): (op, size) for op in chosen for size in sizes}
    tasks = [CheckTask(op, size, dtype, device) for op, size in different.values() for dtype in dtypes]
    # A GPU that one case breaks answers none after it in the same process.
    run = run_tasks if device.type == "cuda" else run_tasks_here
    found: dict[str, list[CheckLine]] = {}
    for done in run(check_task, tasks, lambda task, title: progress(title)):
        for line in answered(done):
            found.setdefault(f"{line.op}: {line.case}", []).append(line)
        if done.task.dtype is dtypes[-1]:
            yield from found.items()
            found.clear()


def answered(done: Done) -> list[CheckLine]:
    """A task's lines; one for all where its process did not come to an end."""
    if not isinstance(done.result, Failed):
        return done.result
    task = done.task
    about = (task.op, of_size(task.op, task.size), _name(task.dtype), "all of it")
    return [CheckLine(*about, failure=done.result.reason, traceback=done.result.printed)]


def check_task(task: CheckTask, tell: Tell) -> list[CheckLine]:
    """The lines of all its cases, titles told as they begin."""
    make_current(task.device)
    # On a GPU stock convolutions use TF32 unless told otherwise.
    tf32.forbid_in_convolutions()
    lines: list[CheckLine] = []
    for case in cases(task.op, task.size, task.dtype, task.device):
        tell(f"{case.op}: {case.title}, {_name(task.dtype)}")
        lines += check_case(case, task.dtype)
    return lines


def check_case(case: CheckCase, dtype: torch.dtype) -> list[CheckLine]:
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
            return [CheckLine(*about, "all of it", failure="; ".join(failed))]
        stock = evaluate(case, dtype, "torch")
        exact = evaluate(case, dtype, "torch", double=True)
        return [
            CheckLine(
                *about,
                name,
                **compare(ours[name], again[name], stock[name], exact[name].double()),
                fallbacks=tuple(fallbacks),
            )
            for name in exact
        ]
    except Exception as error:
        if backend.device_error(error, next(t.device for t in case.tensors.values())):
            raise
        # Of a fallback, what it fell back from.
        within = error.__context__
        cause = within if isinstance(error, UserWarning) and isinstance(within, Exception) else error
        whole = "".join(traceback.format_exception(error))
        return [CheckLine(*about, "all of it", failure=backend.in_a_line(cause), traceback=whole)]


def evaluate(case: CheckCase, dtype: torch.dtype, chosen: str, double: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients by name, of the backend `chosen`; with `double` in float64, of the same inputs."""

    def widened(tensor: Tensor) -> Tensor:
        return tensor.double() if double and tensor.is_floating_point() else tensor

    tensors = {name: widened(tensor).detach() for name, tensor in case.tensors.items()}
    wanted = [tensors[name].requires_grad_() for name in case.differentiable]
    with backend.forced(chosen), torch.set_grad_enabled(not case.inference):
        outputs = case.call(tensors)
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
    """The fields of a line: errors, and what is wrong. All of one shape; `exact` in float64."""
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
