"""Which stock class has which swapped class, and what every swapped forward asks first.

A swapped class is a subclass of its stock class, so a module changes hands by `__class__` alone. Each of its
forwards has three ways out:

- `torch.jit.script` compiles the stock forward, the only branch it can read;
- a wrapper that captured the bound forward before `restore` may call it on a module that is stock again: the
  module's own class answers;
- whenever the fused path would not be what stock computes right now, the stock forward runs, whose parts are
  swapped by themselves.

Where several stock classes have one forward, a mixin in front of each holds the swapped one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as module_globals
from torch.utils.module_tracker import ModuleTracker

# The base of a mixin: none, though type checkers let it use whatever the stock class behind it has.
Mixin: Any = object


@dataclass(frozen=True)
class Rule:
    stock: type[Module]
    swapped: type[Module]
    # Why the fused path may not be taken now, or None: asked for the report and at every call.
    unfusable: Callable[[Module], str | None]
    # The method that the swapped class overrides.
    method: str = "forward"
    # Of a classifier: why its last block is computed for more than the rows that it reads, or None.
    readout_unfusable: Callable[[Module], str | None] | None = None


RULES: dict[type, Rule] = {}


def register(
    stock: type[Module],
    swapped: type[Module],
    unfusable: Callable[[Module], str | None],
    method: str = "forward",
    readout_unfusable: Callable[[Module], str | None] | None = None,
) -> None:
    RULES[stock] = RULES[swapped] = Rule(stock, swapped, unfusable, method, readout_unfusable)


def stock_method(method: Any) -> FunctionType:
    """A stock method under another name, since `torch.jit.script` goes by the name a function was defined with."""
    copy = FunctionType(
        method.__code__,
        method.__globals__,
        f"_stock_{method.__name__}",
        method.__defaults__,
        method.__closure__,
    )
    copy.__annotations__ = method.__annotations__
    return copy


def _watched(hooks: dict[int, Any]) -> bool:
    """Whether anybody watches every module's calls, other than torch's counters that only want to know where they are.

    FlopCounterMode is one: it shall count what is computed.
    """
    return bool(hooks) and any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks.values())


def stock_wanted(x: object) -> bool:
    """Whether this call must run stock code whatever the module is: tracing, ONNX export, hooks on every module."""
    return (
        # torch.fx hands its proxies through.
        not isinstance(x, Tensor)
        or torch.jit.is_tracing()
        # The exporter compiles, and asking it directly costs 2 µs.
        or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())
        or _watched(module_globals._global_forward_hooks)
        or _watched(module_globals._global_forward_pre_hooks)
        or bool(module_globals._global_backward_hooks)
        or bool(module_globals._global_backward_pre_hooks)
    )
