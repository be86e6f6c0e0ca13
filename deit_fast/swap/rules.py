"""Which stock class has which swapped class, and what every swapped method asks first.

A swapped class is a subclass of its stock class, so a module changes hands by `__class__` alone. Its methods stand for
the stock class's: whenever the fused path would not be what stock computes right now, the stock method runs, whose
parts are swapped by themselves. Whoever replaces a method of the stock class, before the swap or after it, is obeyed.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import module as module_globals
from torch.utils._device import DeviceContext
from torch.utils.module_tracker import ModuleTracker

from deit_fast.nn import code
from deit_fast.ops import backend
from deit_fast.swap.calls import count
from deit_fast.swap.copies import RESTORED, Swapped


@dataclass(frozen=True)
class Method:
    """One that a swapped class computes itself. Both functions get the module and the arguments that stock takes."""

    # Why the operators can't compute this call, or None.
    unfusable: Callable[..., str | None]
    fused: Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    stock: type[Module]
    swapped: type[Module]
    # Why the fused path may not be taken now, or None: asked for the report, and at every call by its methods.
    unfusable: Callable[[Module], str | None]
    # The names of the methods that the swapped class overrides; a call of the module begins in the last.
    methods: tuple[str, ...]
    # Of a classifier: why its last block is computed for more than the rows that it reads, or None.
    readout_unfusable: Callable[[Module], str | None] | None = None


RULES: dict[type, Rule] = {}


def register(
    stock: type[Module],
    unfusable: Callable[[Module], str | None],
    methods: dict[str, Method],
    *,
    bypassed: Sequence[str] = (),
    readout_unfusable: Callable[[Module], str | None] | None = None,
    recognised: bool = False,
    **attributes: Any,
) -> Any:
    """Makes the swapped class of `stock`, with these class attributes, and its rule.

    bypassed: methods of the stock class that a fused path computes without calling them. recognised: the methods are
    as they should be; else they are where the class's library wrote them.
    """
    written = {
        name: getattr(stock, name) if recognised else code.original(stock, name) for name in (*methods, *bypassed)
    }

    def replaced(module: Module) -> str | None:
        for name, method in written.items():
            if method is None or getattr(stock, name) is not method:
                return f"{stock.__name__}.{name} was replaced"
        for name in bypassed:
            if name in module.__dict__:
                return f"has a {name} of its own on the instance"
        return None

    def standing_for(name: str, method: Method) -> Callable[..., Any]:
        """The swapped class's method: `method.fused`, or the stock class's where that would be something else."""
        counted, restored = count, RESTORED

        def stands_for(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(self, swapped):
                # A wrapper that captured it before `restore` calls it on a module that is stock again.
                return getattr(type(self), name)(self, *args, **kwargs)
            if restored in self.__dict__:
                return getattr(super(swapped, self), name)(*args, **kwargs)
            reason = replaced(self) or method.unfusable(self, *args, **kwargs)
            counted(self, reason)
            if reason is None:
                return method.fused(self, *args, **kwargs)
            return getattr(super(swapped, self), name)(*args, **kwargs)

        # Who reads it (torch.jit.script, torch.fx, inspect) finds the stock method's source, signature and globals;
        # so it may use no global of this module.
        stock_method = getattr(stock, name)
        # Somebody may have put no function in its place.
        variables = getattr(stock_method, "__globals__", globals())
        stands_for = FunctionType(stands_for.__code__, variables, name, stands_for.__defaults__, stands_for.__closure__)
        return functools.update_wrapper(stands_for, stock_method)

    body = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__, **attributes}
    body |= {name: standing_for(name, method) for name, method in methods.items()}
    metaclass: Any = type(stock)
    swapped = metaclass(stock.__name__, (Swapped, stock), {"_deit_fast_stock": stock, **body})
    RULES[stock] = RULES[swapped] = Rule(
        stock, swapped, lambda module: replaced(module) or unfusable(module), tuple(methods), readout_unfusable
    )
    return swapped


# What every call asks -----------------------------------------------------------------------------------------------

_MODULE_CALL, _CALL_IMPL = (code.original(Module, name) for name in ("_wrapped_call_impl", "_call_impl"))
_LAYER_NORM = F.layer_norm if code.written_by(F.layer_norm, "torch") else None
# Whoever puts another function in the place of one of these has every stock module call it.
_ATTENTION, _LINEAR, _GELU = torch._C._nn.scaled_dot_product_attention, torch._C._nn.linear, torch._C._nn.gelu


def _watched(hooks: dict[int, Any]) -> bool:
    """Whether anybody watches every module's calls, other than torch's counters that only want to know where they are.

    FlopCounterMode is one: it shall count what is computed.
    """
    return any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks.values())


_count_function_modes = torch._C._len_torch_function_stack


def _recorded(call: Any) -> bool:
    """Whether it is what torch.export puts around torch's own, to record which module it is in."""
    return (
        torch.compiler.is_exporting()
        and getattr(call, "__wrapped__", None) is _MODULE_CALL
        and code.written_by(call, "torch.fx")
    )


def _overridden(modes: int) -> bool:
    """Whether a TorchFunctionMode answers for torch's functions.

    A default device is one that makes tensors alone, and torch.export's own write down what is called.
    """
    active = {type(torch._C._get_function_stack_at(i)) for i in range(modes)} - {DeviceContext}
    if active and torch.compiler.is_exporting():
        return not all(mode.__module__.startswith(("torch._export.", "torch.fx.")) for mode in active)
    return bool(active)


def stock_wanted(x: object) -> str | None:
    """Why this call must run stock code whatever the module is, or None."""
    # torch.fx hands its proxies through.
    if not isinstance(x, Tensor) or torch.jit.is_tracing():
        return "is traced"
    if backend.exported_as_stock():
        return "is exported"
    modes = _count_function_modes()
    if modes and _overridden(modes):
        return "a TorchFunctionMode is active"
    if (
        (module_globals._global_forward_hooks and _watched(module_globals._global_forward_hooks))
        or (module_globals._global_forward_pre_hooks and _watched(module_globals._global_forward_pre_hooks))
        or module_globals._global_backward_hooks
        or module_globals._global_backward_pre_hooks
    ):
        return "hooks watch every module"
    call = Module.__call__
    if (call is not _MODULE_CALL and not _recorded(call)) or Module._call_impl is not _CALL_IMPL:
        return "Module.__call__ was replaced"
    if (
        F.scaled_dot_product_attention is not _ATTENTION
        or F.linear is not _LINEAR
        or F.gelu is not _GELU
        or F.layer_norm is not _LAYER_NORM
    ):
        return "a function of torch.nn.functional was replaced"
    return None
