"""Kernel launches executed by ttsem: the Triton IR of each, on CPU tensors, with its bounds and races checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from ttsem import harness, mlir, sanitize

from deit_fast.kernels.launching import hardware, replay
from deit_fast.ops import backend

# The launches' settings, their tiles among them, differ between these.
CAPABILITIES = (80, 90, 100, 120)


@contextmanager
def sanitized(capability: int) -> Iterator[sanitize.Session]:
    """Within it a launch that reads or writes out of bounds, or races, raises `sanitize.KernelFault`.

    What `torch.empty` returns is NaN, so that results show where memory was read that nobody wrote.
    """
    with (
        replay.enabled(False),
        _only_triton(),
        _poisoned(),
        patch.object(harness, "ir_for_launch", _ttir),
        sanitize.session(capability, cuda_is_cpu=False) as session,
    ):
        yield session
    assert not session.races_unchecked


@contextmanager
def _only_triton() -> Iterator[None]:
    """A fault or an argument that the kernels don't take is an error, no reason to ask the stock operators."""

    def refuse(op: str, reason: str) -> None:
        raise AssertionError(f"{op} does not run its kernels: {reason}")

    def give_up(op: str, key: object, asked: str, device: torch.device, error: Exception) -> None:
        raise error

    with (
        backend.forced("triton"),
        patch.object(backend, "give_up", give_up),
        patch.object(backend, "warn_fallback", refuse),
        # Heads too wide for float32 in NVIDIA's registers run in the same kernels on AMD.
        patch.object(hardware, "splits_float32", lambda tensor: False),
    ):
        yield


@contextmanager
def _poisoned() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN, and integers with their largest
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _ttir(record: harness.LaunchRecord, stage: str, target: harness.GPUTarget) -> str:
    """What ttsem itself would first compile down to machine code."""
    mlir.enable_generic_printing()
    return mlir.to_generic(harness._stage_text(record, stage, target), None)
