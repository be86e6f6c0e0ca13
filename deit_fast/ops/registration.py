"""How an operator enters the dispatcher: one schema, and a function for each key.

A light style: Python functions at the CPU, CUDA, Autograd and Autocast keys of a `torch.library.Library`.
`torch.compile`, `torch.export` and dispatch modes see one operator; eager mode pays one dispatcher call.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from deit_fast.ops import backend

_LIBRARY = torch.library.Library("deit_fast", "DEF")
_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}


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
) -> Callable:
    """Defines `torch.ops.deit_fast.<name>` and returns the function to call it by.

    check: raises on arguments that do not fit together, before any work.
    stock: the operator in stock PyTorch, differentiable; the CPU path, and what gradients go through.
    triton: launches the kernels.
    unsupported: why the kernels can't take these arguments, or None.
    fake: shapes and dtypes of the outputs.
    autocast: (dtype, *arguments) -> the arguments as autocast wants them.
    """
    _LIBRARY.define(name + schema)
    op = getattr(torch.ops.deit_fast, name).default

    def implementation(*args):
        check(*args)
        if not backend.use_triton(args[0]):
            return stock(*args)
        reason = unsupported(*args)
        if reason is not None:
            backend.warn_fallback(name, reason)
            return stock(*args)
        return triton(*args)

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    def autograd(*args):
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            check(*args)
            return stock(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

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
        return op(*args)

    return call


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
