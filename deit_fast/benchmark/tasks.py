"""What `deit-fast bench` and `deit-fast tune` give to a worker: one case, or one operator of it, at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from deit_fast.benchmark import clock, measure, operator_cases, operators, profile, tune
from deit_fast.benchmark.contenders import CONTENDERS, ModelCase
from deit_fast.benchmark.measure import TimedStep, noted
from deit_fast.check.workers import Failed, Tell, make_current, run_tasks, run_tasks_here
from deit_fast.kernels.launching import tf32
from deit_fast.kernels.launching.tuned import Choice
from deit_fast.ops.backend import ran_out_of_memory


def runner(device: torch.device) -> Callable:
    """How tasks are run: a GPU that one of them breaks answers none after it in the same process."""
    return run_tasks if device.type == "cuda" else run_tasks_here


def clock_of(device: torch.device) -> clock.Clock:
    return clock.GpuClock(device) if device.type == "cuda" else clock.CpuClock()


@dataclass(frozen=True)
class Measured:
    """One case of `what`: "models", by these contenders, its "operators", or the "profile" of its step."""

    what: str
    case: ModelCase
    device: torch.device
    rounds: int = 1
    contenders: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.case.title}: {self.what}"


def measure_task(task: Measured, tell: Tell) -> None:
    """Tells pairs: ("say", what it does), and ("row", …), ("operator", …), ("kernels", …), ("failed", why)."""
    # On a GPU stock convolutions use TF32 unless told otherwise, and would look less right and faster than they are.
    tf32.forbid_in_convolutions()
    make_current(task.device)
    case, device = task.case, task.device

    def say(words: str) -> None:
        tell(("say", f"{words}: {case.title}"))

    with noted(case, lambda reason: tell(("failed", reason))):
        if task.what == "models":
            chosen = [CONTENDERS[name] for name in task.contenders]
            _tell_all(tell, "row", measure.measure(case, chosen, device, clock_of(device), task.rounds, say))
        elif task.what == "operators":
            found = operators.measure_operators(case, device, clock_of(device), task.rounds, say)
            _tell_all(tell, "operator", found)
        else:
            say("profile")
            step = TimedStep(CONTENDERS["deit_fast"].prepare(case, device), case, device, case.batch)
            tell(("kernels", profile.profiled(step)))


def _tell_all(tell: Tell, kind: str, found: Iterable) -> None:
    for each in found:
        tell((kind, each))


@dataclass(frozen=True)
class Listed:
    """An operator of a case's step, as tuned files know it; its place among them."""

    place: int
    operator: str
    shape: str
    batch: int


@dataclass(frozen=True)
class Tuning:
    """One operator of the case's step, `place`; None asks which there are."""

    case: ModelCase
    device: torch.device
    rounds: int
    place: int | None = None


@dataclass(frozen=True)
class Found:
    """As `tune.Tuned`, without the tensors."""

    choice: Choice
    seconds: dict[str, float]
    tried: int


@lru_cache(maxsize=1)
def _operators(case: ModelCase, device: torch.device) -> list[operator_cases.OperatorCase]:
    return operator_cases.operator_cases(case, device)


def tune_task(task: Tuning, tell: Tell) -> list[Listed] | Found | Failed:
    """Which operators there are, or what was found for one of them, or why nothing was; tells what it does."""
    make_current(task.device)
    try:
        found = _operators(task.case, task.device)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        return Failed(f"out of memory at batch {task.case.batch}")
    if task.place is None:
        return [Listed(place, each.operator.name, each.shape, each.batch) for place, each in enumerate(found)]
    result = next(tune.tune([found[task.place]], clock_of(task.device), task.rounds, tell))
    return Failed(result.failure) if result.failure else Found(result.choice, result.seconds, result.tried)
