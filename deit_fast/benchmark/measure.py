"""Times contenders against each other: checked first, then in rounds, in which each has its turn."""

import gc
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.benchmark.clock import Clock
from deit_fast.benchmark.contenders import CONTENDERS, DTYPES, Contender, ModelCase, is_ours
from deit_fast.benchmark.flops import WithoutProducts, flop_counter
from deit_fast.benchmark.outputs import heads, summed
from deit_fast.check.accuracy import refuse_wrong, relative_error
from deit_fast.check.operator_calls import operator_calls
from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.kernels.launching import tuned
from deit_fast.ops import backend
from deit_fast.swap.core import report as call_report

# Of images, for what is checked and counted, and need not be timed.
FEW = 2
# Draws of drop path's masks, whose FLOPs are averaged.
SEEDS = 10
_CPU = torch.device("cpu")


@dataclass
class Row:
    """One contender in one case.

    seconds: of a call, by round; rounds of all contenders of a case are paired. error: of the logits against the same
    model in float64 (relative L2 norm). failure: why there are no seconds. flops: really computed, an image;
    stock_flops: what the stock model computes. peak_bytes: on a GPU, its weights and inputs included. saved_bytes: kept
    for backward, an image. fallbacks: where the stock operators answered for deit_fast's, and why.
    """

    case: ModelCase
    contender: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    failure: str | None = None
    flops: int | None = None
    stock_flops: int | None = None
    operator_calls: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    fallbacks: list[str] = field(default_factory=list)


class TimedStep:
    """What is timed: a forward pass, or forward, cross-entropy and backward. No optimizer: it is the same for all."""

    def __init__(
        self, model: nn.Module, case: ModelCase, device: torch.device, images: int, heeds_tuning: bool = False
    ) -> None:
        self.model, self.case, self.device, self.heeds_tuning = model, case, device, heeds_tuning
        generator = torch.Generator().manual_seed(1)
        shape = (images, 3, case.img_size, case.img_size)
        self.pixels = torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype])
        self.labels = torch.randint(1000, (images,), generator=generator).to(device)

    def __call__(self) -> Tensor:
        """The logits, heads side by side in training."""
        with tuned.enabled(self.heeds_tuning):
            return self._run()

    def _run(self) -> Tensor:
        case = self.case
        amp = nullcontext() if case.amp is None else torch.autocast(self.device.type, DTYPES[case.amp])
        if not case.training:
            with torch.inference_mode(), amp:
                return heads(self.model(self.pixels))[0]
        with amp:
            logits = heads(self.model(self.pixels))
            loss: Any = sum(F.cross_entropy(each.float(), self.labels) for each in logits)
        loss.backward()
        self.model.zero_grad()
        return torch.cat(logits, 1).detach()


def measure(
    case: ModelCase,
    contenders: list[Contender],
    device: torch.device,
    clock: Clock,
    rounds: int,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """A row for each contender, timed or with the reason why not; of an interrupted case, what is whole.

    Says `2 + rounds` times for each what it does.
    """
    rows = {contender.name: Row(case, contender.name) for contender in contenders}
    try:
        # Past its limit dynamo would run the stock code without a word, under the name of a compiled contender.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            _measure(rows, case, contenders, device, clock, rounds, say)
    except (KeyboardInterrupt, DeviceLostError):
        yield from whole_rounds(rows.values())
        raise
    yield from rows.values()


def _measure(
    rows: dict[str, Row],
    case: ModelCase,
    contenders: list[Contender],
    device: torch.device,
    clock: Clock,
    rounds: int,
    say: Callable[[str], None],
) -> None:
    steps: dict[str, TimedStep] = {}
    own_bytes: dict[str, int] = {}
    for contender in contenders:
        row = rows[contender.name]
        say(f"{contender.name}: checking")
        with failures(row):
            before = _allocated(device)
            model = contender.prepare(case, device)
            row.error = check(contender, model, case, device)
            row.fallbacks += stock_calls(model)
            count(row, contender, case)
            steps[contender.name] = TimedStep(model, case, device, case.batch, contender.tuned)
            own_bytes[contender.name] = _allocated(device) - before
    calls = {}
    for name, step in list(steps.items()):
        say(f"{name}: warming up")
        with failures(rows[name]):
            # The models of the others are there, too.
            resident = _restart_peak(device)
            calls[name] = clock.calls(step)
            peak = _peak(device)
            if peak is not None:
                rows[name].peak_bytes = peak - resident + own_bytes[name]
        if rows[name].failure is not None:
            del steps[name]
    names = list(steps)
    for i in range(rounds):
        # Another one begins each round.
        for name in names[i % len(names) :] + names[: i % len(names)] if names else ():
            say(f"round {i + 1} of {rounds}: {name}")
            # The same masks for all.
            torch.manual_seed(i)
            with failures(rows[name]):
                rows[name].seconds.append(clock.seconds(steps[name], calls[name]))
        names = [name for name in names if rows[name].failure is None]


def whole_rounds(rows: Collection) -> list:
    """What an interrupted case leaves: the rounds in which each had its turn, so that they stay paired; failures."""
    done = min((len(row.seconds) for row in rows if row.failure is None), default=0)
    for row in rows:
        del row.seconds[done:]
    return [row for row in rows if row.seconds or row.failure]


def best_peer(rows: Iterable) -> Any:
    """The fastest of the rows of one case that are not deit_fast's; None where none was timed."""
    timed = (row for row in rows if row.seconds and not is_ours(row.contender))
    return min(timed, key=lambda row: median(row.seconds), default=None)


def check(contender: Contender, model: nn.Module, case: ModelCase, device: torch.device) -> float:
    """The error of the model's logits; drop path off.

    Raises:
        ArithmeticError: it is more than `WRONG_FACTOR` times the stock model's.
    """
    few, still = replace(case, batch=FEW), replace(case, batch=FEW, training=False)
    stock_model = _stock(contender, model, few)
    expected = TimedStep(stock_model.double().eval(), replace(still, dtype="float64", amp=None), _CPU, FEW)().double()
    training = model.training
    found = TimedStep(model.eval(), still, device, FEW, contender.tuned)().double().cpu()
    model.train(training)
    own = stock_model.to(device, DTYPES[case.dtype])
    of_stock = TimedStep(own, still, device, FEW)().double().cpu()
    error, allowed = (relative_error(logits, expected) for logits in (found, of_stock))
    refuse_wrong(error, allowed, DTYPES[case.amp or case.dtype], "model")
    return error


def stock_calls(model: nn.Module) -> list[str]:
    """Where a swapped model's stock code has run, and why."""
    reasons = call_report(model).stock
    return [f"{name or '(model)'} ran as stock: {reason}" for name, reason in reasons.items()]


def _stock(contender: Contender, model: nn.Module, case: ModelCase) -> nn.Module:
    """What `model` is held to: a stock model with its weights."""
    if contender.reference is not None:
        return contender.reference(case).to(DTYPES[case.dtype])
    stock_model = (CONTENDERS["timm"] if contender.stock else contender).build(case)
    stock_model.load_state_dict(model.state_dict())
    return stock_model


def count(row: Row, contender: Contender, case: ModelCase) -> None:
    """FLOPs, operator calls and saved bytes, on the CPU, of a few images; none where the model can't run there."""
    if contender.reference is not None:
        return
    step = _on_cpu(contender, case)
    row.flops = _flops(step)
    row.stock_flops = _flops(_on_cpu(CONTENDERS[contender.stock], case)) if contender.stock else row.flops
    with WithoutProducts():
        row.operator_calls = operator_calls(step)
        if case.training:
            row.saved_bytes = saved_bytes(step.model, lambda: summed(step.model(step.pixels))) // FEW


def _on_cpu(contender: Contender, case: ModelCase) -> TimedStep:
    model = contender.build(case).to(DTYPES[case.dtype]).train(case.training)
    return TimedStep(model, case, _CPU, FEW)


def _flops(step: TimedStep) -> int:
    """Of an image; with drop path, the mean of several draws."""
    seeds = SEEDS if step.case.training and step.case.drop_path > 0 else 1
    with WithoutProducts(), flop_counter() as counter:
        for seed in range(seeds):
            torch.manual_seed(seed)
            step()
    return counter.get_total_flops() // (FEW * seeds)


@contextmanager
def failures(row: Any) -> Iterator[None]:
    """Notes in the row what goes wrong in the block, and where stock operators answer: the others are still wanted."""

    def failed(reason: str) -> None:
        row.failure = reason
        row.seconds.clear()

    with backend.fallbacks() as heard:
        try:
            with noted(row.case, failed):
                yield
        finally:
            row.fallbacks += [message for message in heard if message not in row.fallbacks]


class DeviceLostError(RuntimeError):
    """No later call in this process is answered either."""


@contextmanager
def noted(case: ModelCase, note: Callable[[str], None]) -> Iterator[None]:
    """Hands `note` the reason where the block, which is about `case`, fails: the rest of the run goes on.

    Raises:
        DeviceLostError: it can't, in this process.
    """
    try:
        yield
    except DeviceLostError:
        raise
    except Exception as error:  # whatever a library, a compiler or a driver raises
        if torch.cuda.is_initialized() and backend.device_error(error, torch.device("cuda")) is not None:
            reason = backend.in_a_line(error)
            note(reason)
            raise DeviceLostError(reason) from error
        if backend.ran_out_of_memory(error):
            note(f"out of memory at batch {case.batch}")
        else:
            note(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _allocated(device: torch.device) -> int:
    """Bytes of the GPU in use."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _restart_peak(device: torch.device) -> int:
    """Bytes of the GPU in use, from which `_peak` counts on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return _allocated(device)


def _peak(device: torch.device) -> int | None:
    """Bytes of the GPU in use at most since `_restart_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
