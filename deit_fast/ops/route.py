"""The one way from an operator's call to its kernels."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from deit_fast.kernels.launching import hardware, tuned
from deit_fast.kernels.launching.settings import settings
from deit_fast.ops import backend
from deit_fast.ops.chain import note, noting
from deit_fast.ops.flat import Layout

if TYPE_CHECKING:
    from deit_fast.ops.operator import Operator

_PLAIN = frozenset({Tensor, Parameter})
# Where nothing has been looked up yet: None is that nothing was measured.
_UNKNOWN = tuned.Choice(False, {})


def route(operator: "Operator", layout: Layout, flat: tuple, dispatched: bool = False) -> Any:
    """A call without gradients: by its plan where it has one, and past the dispatcher where nobody looks at that.

    layout, flat: the arguments as `Operator.flatten` gives them. dispatched: whether the dispatcher has chosen this.
    """
    if not dispatched and (torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled()):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return operator.op(*layout.gather(*flat))
    launches, key = backend.use_triton(flat[0]), None
    if launches:
        plan, key, pointers = operator.replayed.plan(layout.lengths, flat)
        if plan is not None:
            try:
                found = plan.run(*pointers)
                if noting:
                    note(plan, pointers, found)
                return found
            except Exception as error:
                backend.raise_if_not_the_kernels(error, flat[0].device)
                operator.replayed.drop(key, error)
    args = layout.gather(*flat)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        # Subclasses of Tensor have kernels of their own, and so have tensors without memory.
        if not dispatched and not all(map(_is_plain, flat)):
            return operator.op(*args)
        if not launches:
            return _stock(operator, args)
        found = _launch(operator, key, args, flat[0].device)
        if noting:
            # None where stock has answered, which never has a plan. Where nothing launches there are no chains.
            note(operator.replayed.plans.get(key), pointers, found)
        return found


def _stock(operator: "Operator", args: tuple) -> Any:
    operator.check(operator.Arguments(*args))
    return operator.stock(*args)


def _launch(operator: "Operator", key: tuple | None, args: tuple, device: torch.device) -> Any:
    """A call that has no plan: its kernels, or the stock form where they failed, lost, or don't claim to do it."""
    replayed = operator.replayed
    if backend.failed and backend.has_failed(operator.name, key or _asked(operator, args)):
        return operator.stock(*args)
    choice = replayed.choices.get(key, _UNKNOWN)
    if choice is not None and choice.stock:
        return operator.stock(*args)
    a = operator.Arguments(*args)
    operator.check(a)
    reason = operator.unsupported(a)
    if reason is not None:
        backend.warn_fallback(operator.name, reason)
        return operator.stock(*args)
    if choice is _UNKNOWN:
        choice = None if key is None else _measured(operator, args, device)
        replayed.choices[key] = choice
        if choice is not None and choice.stock:
            return operator.stock(*args)
    if choice is not None:
        try:
            with settings(choice.settings):
                return replayed(key, args)
        except Exception as error:  # whatever Triton, ptxas or a driver raises: what ships is still wanted
            backend.raise_if_not_the_kernels(error, device)
            tuned.refuse(operator.name, backend.in_a_line(error))
            replayed.choices[key] = None
    try:
        return replayed(key, args)
    except Exception as error:
        asked = _asked(operator, args)
        backend.give_up(operator.name, key or asked, asked, device, error)
        return operator.stock(*args)


def _measured(operator: "Operator", args: tuple, device: torch.device) -> tuned.Choice | None:
    """What `deit-fast tune` found for these arguments on their device."""
    if hardware.interpreted() or not tuned.is_there():
        return None
    return tuned.choice(
        operator.name, operator.arguments, args, hardware.device_name(device), hardware.driver_version()
    )


def _asked(operator: "Operator", args: tuple) -> str:
    shape, batch = tuned.described(operator.arguments, args)
    return f"batch {batch}, {shape.replace(',', ' ')}"


def _is_plain(argument: object) -> bool:
    """Whether it is no subclass of Tensor, and no tensor without memory."""
    return not isinstance(argument, Tensor) or (type(argument) in _PLAIN and not argument.is_meta)
