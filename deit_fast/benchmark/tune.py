"""Measures what an operator can be launched with, and the stock operators beside it: the fastest is kept."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deit_fast.benchmark.candidates import in_turn, leads_elsewhere, neighbours, tunable
from deit_fast.benchmark.clock import Clock
from deit_fast.benchmark.operator_cases import OperatorCase
from deit_fast.check.accuracy import relative_error
from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.replay import Replayed
from deit_fast.kernels.launching.settings import settings as launched_with
from deit_fast.kernels.launching.tuned import Choice
from deit_fast.ops.backend import ran_out_of_memory

# What is not faster by as much is noise, and what is shipped stays.
LEAST_GAIN = 0.02
# Of the shipped result's norm; other tiles add up in another order, wrong ones are further away.
_ALLOWED = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
_FINALISTS = 3


@dataclass
class Tuned:
    """What was found for one operator. seconds: the medians, by what ran: "stock", "shipped", "tuned".

    failure: why nothing was found, and what is shipped stays.
    """

    case: OperatorCase
    choice: Choice
    seconds: dict[str, float]
    tried: int
    failure: str | None = None


def tune(
    cases: list[OperatorCase], clock: Clock, rounds: int, say: Callable[[str], None], ends: float = float("inf")
) -> Iterator[Tuned]:
    """One result for each of `cases`, as soon as it is there. ends: when, by `time.monotonic`, no more is tried."""
    for i, case in enumerate(cases):
        say(f"{i + 1} of {len(cases)}: {case.title}")
        try:
            with torch.no_grad():
                result = _tuned(case, clock, rounds, ends)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            result = _failed(case, f"out of memory at batch {case.batch}")
        yield result


def _failed(case: OperatorCase, reason: str) -> Tuned:
    return Tuned(case, Choice(False, {}), {}, 0, reason)


def _tuned(case: OperatorCase, clock: Clock, rounds: int, ends: float) -> Tuned:
    operator, arguments = case.operator, case.arguments

    def stock() -> object:
        return operator.stock(*arguments)

    reason = operator.unsupported(operator.Arguments(*arguments))
    if reason is not None:
        return _failed(case, reason)
    shipped: dict[str, object] = {}
    shipped_call = _prepared(case, {}, None, shipped)
    if isinstance(shipped_call, str):
        return _failed(case, shipped_call)
    # Of packed tensors what lies past the kept samples is anything.
    packed = getattr(operator.Arguments(*arguments), "kept", None) is not None
    expected = None if packed else shipped_call()

    tries = _Tries(case, clock, expected, shipped, shipped_call, ends)
    best: dict[str, object] = {}
    for asked, setting in in_turn(shipped):
        best = _settled(tries, asked, setting, best)

    finalists = sorted(tries.timed, key=tries.timed.__getitem__)[:_FINALISTS]
    contenders: dict[Any, Callable[[], object]] = {
        "stock": stock,
        (): shipped_call,
        **{key: tries.calls[key] for key in finalists if key in tries.calls},
    }
    counts = {name: clock.calls(call) for name, call in contenders.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            seconds[name].append(clock.seconds(call, counts[name]))
    medians = {name: median(values) for name, values in seconds.items()}
    fastest = min((key for key in medians if key != "stock"), key=medians.__getitem__)
    if medians[fastest] > (1 - LEAST_GAIN) * medians[()]:
        fastest = ()
    found = {"stock": medians["stock"], "shipped": medians[()], "tuned": medians[fastest]}
    stock_wins = medians["stock"] < medians[fastest]
    choice = Choice(stock_wins, {} if stock_wins else tries.heeded(fastest))
    return Tuned(case, _as_json(choice), found, len(tries.timed) - 1)


class _Tries:
    """What one call takes with settings that were tried, infinity where they are out of the question; the calls."""

    def __init__(
        self,
        case: OperatorCase,
        clock: Clock,
        expected: object,
        shipped: dict[str, object],
        shipped_call: Callable[[], object],
        ends: float,
    ) -> None:
        self.ends = ends
        self.case, self.clock, self.expected, self.shipped = case, clock, expected, shipped
        self.calls: dict[tuple, Callable[[], object]] = {(): shipped_call}
        self.asked: dict[tuple, dict[str, object]] = {}
        self.timed: dict[tuple, float] = {(): self._once(shipped_call)}

    def seconds(self, settings: dict[str, object]) -> float:
        key = self._key(settings)
        if key not in self.timed and time.monotonic() > self.ends:
            return float("inf")
        if key not in self.timed:
            call = _prepared(self.case, settings, self.expected, self.asked.setdefault(key, {}))
            if isinstance(call, str):
                self.timed[key] = float("inf")
            else:
                self.calls[key], self.timed[key] = call, self._once(call)
        return self.timed[key]

    def further(self, settings: dict[str, object]) -> dict[str, object]:
        """What the launcher asks with `settings`, which ran, and does not ask as shipped, with the table's answers."""
        asked = self.asked[self._key(settings)]
        return {each: answer for each, answer in asked.items() if each not in settings and each not in self.shipped}

    def heeded(self, key: tuple) -> dict[str, object]:
        """Of a key's settings, those that the launcher asks for: not the tile of what the vendor's GEMM computes."""
        return {each: setting for each, setting in key if each in self.asked[key]}

    @staticmethod
    def _key(settings: dict[str, object]) -> tuple:
        return tuple(sorted(settings.items(), key=lambda item: item[0]))

    def _once(self, call: Callable[[], object]) -> float:
        return self.clock.seconds(call, self.clock.calls(call))


def _settled(tries: _Tries, asked: str, setting: object, best: dict[str, object]) -> dict[str, object]:
    """`best`, with the fastest answer to `asked`; that of another kernel leads to questions of its own."""
    if tunable(asked):
        best = _climb(tries, asked, setting, best)
    if leads_elsewhere(asked):
        other = {**best, asked: not setting}
        if tries.seconds(other) < float("inf"):
            for instead, answer in in_turn(tries.further(other)):
                other = _settled(tries, instead, answer, other)
        best = min(best, other, key=tries.seconds)
    return best


def _climb(tries: _Tries, asked: str, setting: object, best: dict[str, object]) -> dict[str, object]:
    """`best`, with the answer to `asked` that is faster than all its neighbours; `setting` is the shipped one."""
    while True:
        others = (other for other in neighbours(asked, best.get(asked, setting)) if other != setting)
        fastest = min(({**best, asked: other} for other in others), key=tries.seconds, default=best)
        if tries.seconds(fastest) >= (1 - LEAST_GAIN) * tries.seconds(best):
            return best
        best = fastest


def _prepared(
    case: OperatorCase, settings: dict[str, object], expected: object, asked: dict[str, object] | None = None
) -> Callable[[], object] | str:
    """The operator's launches with `settings`, to be made again and again; or why they are out of the question.

    expected: what they must compute, unless None. asked: fills with the settings that the launcher asked for.
    """
    operator, arguments = case.operator, case.arguments
    replayed = Replayed(operator.name, operator.launcher)
    try:
        layout, flat = operator.flatten(*arguments)
        called = layout.lengths, flat
        key = replayed.plan(*called)[1]
        with launched_with(settings) as questions, run.recorded() as launches:
            found = replayed(key, arguments)
        spilled = max((getattr(each.compiled, "n_spills", 0) or 0 for each in launches), default=0)
        if spilled:
            return f"spills {spilled} registers"
        if expected is not None and not _agree(found, expected):
            return "computes something else"
    except Exception as error:  # whatever a compiler or a driver raises: the others are still wanted
        return f"{type(error).__name__}: {error}".splitlines()[0]
    if asked is not None:
        asked.update(questions)
    plan = replayed.plans.get(key)
    if plan is not None:
        return lambda: plan.run(*replayed.plan(*called)[2])

    def call() -> object:
        with launched_with(settings):
            return operator.launcher(*arguments)

    return call


def _agree(found: object, expected: object) -> bool:
    pairs = list(zip(_tensors(found), _tensors(expected), strict=True))
    largest = max((theirs.double().norm().item() for _, theirs in pairs), default=0.0)
    # The gradient of a key's bias is nothing but rounding: it is held to the size of the others.
    return all(relative_error(ours, theirs, least=largest / 100) <= _ALLOWED[theirs.dtype] for ours, theirs in pairs)


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.dtype in _ALLOWED]


def _as_json(choice: Choice) -> Choice:
    """Tiles by the names of their fields."""

    def plain(setting: Any) -> object:
        if hasattr(setting, "_asdict"):
            return setting._asdict()
        return [plain(part) for part in setting] if isinstance(setting, tuple) else setting

    return Choice(choice.stock, {asked: plain(setting) for asked, setting in choice.settings.items()})
