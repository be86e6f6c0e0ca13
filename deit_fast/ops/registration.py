"""How an operator enters the dispatcher: one schema, and a function for each key.

A light style: Python functions at the CPU, CUDA, Autograd and Autocast keys of a `torch.library.Library`.
`torch.compile`, `torch.export` and dispatch modes see one operator; eager mode pays one dispatcher call.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from deit_fast.kernels import launch, tuned
from deit_fast.kernels.replay import Replayed
from deit_fast.ops import backend

_LIBRARY = torch.library.Library("deit_fast", "DEF")
_PLAIN = frozenset({Tensor, Parameter})
_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}


class Operator(NamedTuple):
    """What `deit-fast tune` measures. parameters: their names in the operator's schema; the rest as in `register`."""

    name: str
    parameters: tuple[str, ...]
    stock: Callable
    launcher: Callable
    unsupported: Callable[..., str | None]

    @property
    def call(self) -> Callable:
        """The operator in the dispatcher."""
        return getattr(torch.ops.deit_fast, self.name)


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    schema: str,
    *,
    check: Callable[..., None],
    stock: Callable,
    triton: Callable,
    unsupported: Callable[..., str | None],
    fake: Callable,
    autocast: Callable[..., tuple],
    save: Callable,
    backward: Callable[..., tuple],
    own_backward: bool = False,
) -> Callable:
    """Defines `torch.ops.deit_fast.<name>` and returns the function to call it by.

    The function has another, `branching`, for where a residual goes past the operator: what it returns and its first
    argument. `backward` then gets that one's gradient after the others, to add it where it writes its own.

    check: raises on arguments that do not fit together, before any work.
    stock: the operator in stock PyTorch, differentiable; the CPU path.
    triton: launches the kernels.
    unsupported: why the kernels can't take these arguments, or None.
    fake: shapes and dtypes of the outputs.
    autocast: (dtype, *arguments) -> the arguments as autocast wants them.
    save: (ctx, arguments, outputs), keeps for backward what backward reads.
    backward: (ctx, *gradients of the outputs) -> a gradient or None for each argument.
    own_backward: whether autograd, of `stock`, would not do as well: keep more, or find no gradient where it is 0.
    """
    _LIBRARY.define(name + schema)
    op = getattr(torch.ops.deit_fast, name).default
    replayed = Replayed(name, triton)
    OPERATORS[name] = Operator(name, _parameters(op), stock, triton, unsupported)
    implementation, anew = _implementation(OPERATORS[name], check, replayed)
    below_autograd = _below_autograd(op, replayed, implementation, anew)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            outputs = below_autograd(*args)
            ctx.set_materialize_grads(False)
            save(ctx, args, outputs)
            return outputs

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    class Branching(Function):
        @staticmethod
        def forward(ctx, *args):
            return *_as_tuple(Function.forward(ctx, *args)), args[0]

    # Past what Function does for torch.func alone, whose transforms never come here.
    apply = super(torch.autograd.Function, Function).apply
    apply_branching = super(torch.autograd.Function, Branching).apply

    kept = OPERATORS[name].parameters.index("kept") if "kept" in OPERATORS[name].parameters else None

    def transparent(args: tuple) -> bool:
        if not backend.transparent(args[0]) or (own_backward and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_dynamo_compiling():
            # How many samples are kept must not become a shape of the graph.
            return kept is None or args[kept] is None
        # A dispatch mode sees our operators on every device.
        return not torch._C._len_torch_dispatch_stack()

    def autograd(*args):
        if transparent(args):
            check(*args)
            return stock(*args)
        if torch.is_grad_enabled():
            for argument in args:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return apply(*args)
        return below_autograd(*args)

    _LIBRARY.impl(name, implementation, "CPU")
    _LIBRARY.impl(name, implementation, "CUDA")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"deit_fast::{name}", checked_fake, lib=_LIBRARY)
    for device_type, key in _AUTOCAST_KEYS.items():
        _LIBRARY.impl(name, _autocast_kernel(op, autocast, device_type, key), key.name)

    def call(*args):
        # torch.func transforms do not see through Python-registered operators.
        if torch._C._are_functorch_transforms_active():
            return stock(*args)
        if torch._C._is_any_autocast_enabled():
            return op(*args)
        if torch.compiler.is_dynamo_compiling() and not transparent(args):
            return op(*args)
        # Where the dispatcher would go next, without its way through Python.
        return autograd(*args)

    def branching(*args) -> tuple:
        x = args[0]
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_dynamo_compiling()
            or torch._C._are_functorch_transforms_active()
            or transparent(args)
        ):
            return *_as_tuple(call(*args)), x
        if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(x.device.type):
            return apply_branching(*args)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[x.device.type])):
            return apply_branching(*autocast(torch.get_autocast_dtype(x.device.type), *args))

    call.branching = branching
    return call


def _as_tuple(outputs: Tensor | tuple) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def register_backward(
    name: str,
    schema: str,
    *,
    stock: Callable,
    triton: Callable,
    unsupported: Callable[..., str | None],
    fake: Callable,
) -> Callable:
    """Defines a backward operator: `register` without gradients of its own, which it refuses loudly."""
    _LIBRARY.define(name + schema)
    op = getattr(torch.ops.deit_fast, name).default
    replayed = Replayed(name, triton)
    OPERATORS[name] = Operator(name, _parameters(op), stock, triton, unsupported)
    implementation, anew = _implementation(OPERATORS[name], _no_check, replayed)
    below_autograd = _below_autograd(op, replayed, implementation, anew)

    def autograd(*args):
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for a in args for t in (a if isinstance(a, list) else [a])
        ):
            raise NotImplementedError(
                f"deit_fast.{name} has no derivative: second derivatives need the stock model "
                f"(deit_fast.restore) or a torch.func transform"
            )
        return below_autograd(*args)

    _LIBRARY.impl(name, implementation, "CPU")
    _LIBRARY.impl(name, implementation, "CUDA")
    _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"deit_fast::{name}", fake, lib=_LIBRARY)
    # Inside an autocast block the CPU path's own products would be cast again.
    for device_type, key in _AUTOCAST_KEYS.items():
        _LIBRARY.impl(name, _autocast_kernel(op, lambda dtype, *args: args, device_type, key), key.name)

    def call(*args):
        if torch.compiler.is_dynamo_compiling() or torch._C._is_any_autocast_enabled():
            return op(*args)
        return autograd(*args)

    return call


def _no_check(*args) -> None:
    """Backward operators get what a forward operator has already checked."""


def _below_autograd(op, replayed: Replayed, implementation: Callable, anew: Callable) -> Callable:
    """The operator without gradients: by its plan if it has one, and past the dispatcher where nobody looks at that."""

    def below_autograd(*args):
        if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args)
        launches, key = backend.use_triton(args[0]), None
        if launches:
            plan, key, pointers = replayed.plan(args)
            if plan is not None:
                try:
                    return plan.run(pointers)
                except Exception as error:
                    _drop_plan(replayed, key, error, args[0].device)
        with torch._C._AutoDispatchBelowAutograd():
            if not _plain(args):
                return op(*args)
            return anew(key, args) if launches else implementation(*args)

    return below_autograd


def _plain(args: tuple | list) -> bool:
    """Whether none is, or holds, a subclass of Tensor or a tensor without memory: those have kernels of their own."""
    for argument in args:
        kind = type(argument)
        if kind is list:
            if not _plain(argument):
                return False
        elif isinstance(argument, Tensor) and (kind not in _PLAIN or argument.is_meta):
            return False
    return True


def _parameters(op) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._schema.arguments)


def _implementation(operator: Operator, check: Callable, replayed: Replayed) -> tuple[Callable, Callable]:
    """The operator below autograd, and what it does for arguments on its kernels' device that have no plan: by key."""
    name, parameters, stock, _, unsupported = operator

    def implementation(*args):
        if not backend.use_triton(args[0]):
            check(*args)
            return stock(*args)
        plan, key, pointers = replayed.plan(args)
        if plan is not None:
            try:
                return plan.run(pointers)
            except Exception as error:
                _drop_plan(replayed, key, error, args[0].device)
        return anew(key, args)

    def anew(key: tuple | None, args: tuple):
        if backend.failed and backend.has_failed(name, key or asked(args)):
            return stock(*args)
        choice = replayed.choices.get(key)
        if choice is not None and choice.stock:
            return stock(*args)
        check(*args)
        reason = unsupported(*args)
        if reason is not None:
            backend.warn_fallback(name, reason)
            return stock(*args)
        if key is not None and key not in replayed.choices:
            choice = replayed.choices[key] = _measured(operator, args)
            if choice is not None and choice.stock:
                return stock(*args)
        try:
            with nullcontext() if choice is None else launch.settings(choice.settings):
                return replayed(key, args)
        except Exception as error:  # whatever Triton, ptxas or a driver raises on a user's GPU
            device = args[0].device
            if choice is None:
                backend.give_up(name, key or asked(args), asked(args), device, error)
                return stock(*args)
            backend.raise_if_not_the_kernels(error, device)
            tuned.refuse(name, backend.in_a_line(error))
            replayed.choices[key] = None
            return anew(key, args)

    def asked(args: tuple) -> str:
        shape, batch = tuned.described(parameters, args)
        return f"batch {batch}, {shape.replace(',', ' ')}"

    return implementation, anew


def _drop_plan(replayed: Replayed, key: tuple, error: Exception, device: torch.device) -> None:
    """A plan that did not run is not to be asked again; what the kernels are not to blame for is raised."""
    backend.raise_if_not_the_kernels(error, device)
    replayed.drop(key, error)


def _measured(operator: Operator, args: tuple) -> tuned.Choice | None:
    """What `deit-fast tune` found for these arguments on their device."""
    if launch.interpreted() or not tuned.is_there():
        return None
    device = launch.device_name(args[0].device)
    return tuned.choice(operator.name, operator.parameters, args, device, launch.driver_version())


def _autocast_kernel(op, autocast: Callable[..., tuple], device_type: str, key) -> Callable:
    keys = torch._C.DispatchKeySet(key)

    def kernel(*args):
        args = autocast(torch.get_autocast_dtype(device_type), *args)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*args)

    return kernel


def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an eligible argument: floating, and not float64."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(dtype)


def distribute(gradients: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The gradients asked for, at their places among all."""
    found = iter(gradients)
    return [next(found) if need else None for need in needs]
