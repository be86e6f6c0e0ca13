"""Which implementation an operator runs: the Triton kernels or the stock PyTorch operators."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CHOICES = ("triton", "torch")


def _from_environment() -> str | None:
    choice = os.environ.get("DEIT_FAST_BACKEND") or None
    if choice not in (None, *_CHOICES):
        raise ValueError(f"DEIT_FAST_BACKEND must be 'triton' or 'torch', or unset; got {choice!r}")
    return choice


_forced: str | None = _from_environment()
_warned: set[str] = set()


def use_triton(tensor: torch.Tensor) -> bool:
    """Triton on CUDA and ROCm tensors, stock operators elsewhere, unless one of them is forced."""
    if _forced is None:
        return tensor.is_cuda
    return _forced == "triton"


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
    """Says once per operator and reason that the stock operator answers instead of the kernel."""
    message = f"deit_fast.{op}: {reason}; using the stock PyTorch operators"
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
