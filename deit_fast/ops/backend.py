"""Which implementation an operator runs: the Triton kernels or the stock PyTorch operators."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deit_fast.kernels.hardware import lacking

_CHOICES = ("triton", "torch")


def _from_environment() -> str | None:
    choice = os.environ.get("DEIT_FAST_BACKEND") or None
    if choice not in (None, *_CHOICES):
        raise ValueError(f"DEIT_FAST_BACKEND must be 'triton' or 'torch', or unset; got {choice!r}")
    return choice


_forced: str | None = _from_environment()
# Fallbacks that have been warned of.
said: set[str] = set()
# Operators whose kernels failed in this process → why.
failed: dict[str, str] = {}


def use_triton(tensor: torch.Tensor) -> bool:
    """Triton on CUDA and ROCm tensors, stock operators elsewhere, unless one of them is forced."""
    if _forced is None:
        return tensor.is_cuda
    return _forced == "triton"


def transparent(tensor: torch.Tensor) -> bool:
    """Whether an operator is nothing but its stock PyTorch form here: on the CPU, unless a backend is forced.

    Autograd, Dynamo and subclasses then find what they find in a stock model. Forced to "torch", stock operators stand
    behind ours, as on a GPU that the kernels can't serve.
    """
    return _forced is None and tensor.device.type == "cpu"


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Forces `"triton"` or `"torch"` within the block; `None` is the automatic choice."""
    global _forced
    if backend not in (None, *_CHOICES):
        raise ValueError(f"backend must be 'triton', 'torch' or None; got {backend!r}")
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


def warn_fallback(op: str, reason: str) -> None:
    """Says once per operator and reason, or once for what a device lacks, that the stock operators answer."""
    who = "deit_fast" if reason in lacking else f"deit_fast.{op}"
    message = f"{who}: {reason}; using the stock PyTorch operators"
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=4)


def gives_up(op: str, error: Exception) -> bool:
    """Whether the stock operators answer, from here on, for an operator whose kernels did not compile or launch.

    Says so, once. Not where memory ran out, which is no fault of the kernels: whoever catches that must see it.
    """
    if ran_out_of_memory(error):
        return False
    reason = in_a_line(error)
    warnings.warn(
        f"deit_fast.{op}: its kernels failed ({reason}); the stock PyTorch operators answer in this process. "
        f"Please report this with the output of: deit-fast check",
        stacklevel=4,
    )
    failed[op] = reason
    return True


def ran_out_of_memory(error: Exception) -> bool:
    """A GPU's memory, or the CPU's, whose allocator raises a RuntimeError of its own."""
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError | MemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def in_a_line(error: Exception) -> str:
    """The class and the message; of many lines, as compilers write, the first and the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join((type(error).__name__, " … ".join(dict.fromkeys(lines[:1] + lines[-1:]))))
