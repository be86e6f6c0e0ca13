"""How often each swapped module ran on the operators, how often as stock, and why the last time."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import Module

from deit_fast.swap.report import table

_ATTRIBUTE = "_deit_fast_calls"


@dataclass(slots=True)
class Calls:
    """Of one module, since it was swapped. `reason`: why its stock code ran, the last time it did."""

    fused: int = 0
    stock: int = 0
    reason: str | None = None


def calls_of(module: Module) -> Calls:
    """Those of a swapped module."""
    calls = module.__dict__.get(_ATTRIBUTE)
    return module.__dict__.setdefault(_ATTRIBUTE, Calls()) if calls is None else calls


def count(module: Module, reason: str | None) -> None:
    """A call of `module`, fused or (with a reason) stock. A compiled call is not counted: a graph has no such state."""
    if torch.compiler.is_compiling():
        return
    calls = calls_of(module)
    if reason is None:
        calls.fused += 1
    else:
        calls.stock += 1
        calls.reason = reason


@dataclass
class CallReport:
    """`calls`: name → how a swapped module ran since it was swapped. `classes`: name → its class.

    The root module's name is the empty string. A module with no calls runs within a swapped one that holds it, or in
    compiled graphs, which are not counted. Printed, it is a table in which numbered modules of one outcome share a row.
    """

    calls: dict[str, Calls] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)

    @property
    def stock(self) -> dict[str, str]:
        """Name → why stock code ran, of the modules where it did."""
        return {name: calls.reason or "" for name, calls in self.calls.items() if calls.stock}

    def __str__(self) -> str:
        rows: dict[str, tuple[str, ...]] = {}
        for name, calls in self.calls.items():
            reason = f"{calls.stock}, the last: {calls.reason}" if calls.stock else "0"
            rows[name] = (self.classes[name], str(calls.fused), reason)
        return table(("module", "class", "number", "fused", "stock"), rows)


def calls_in(model: Module, is_swapped: Callable[[Module], bool]) -> CallReport:
    """Of the swapped modules of `model`; they count on."""
    report = CallReport()
    for name, module in model.named_modules():
        if is_swapped(module):
            report.calls[name] = calls_of(module)
            report.classes[name] = type(module).__name__
    return report
