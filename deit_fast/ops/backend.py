"""Which implementation an operator runs: the Triton kernels or the stock PyTorch operators."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from deit_fast.kernels.launching import hardware
from deit_fast.kernels.launching.hardware import lacking
from deit_fast.kernels.linear import vendor_gemm

_CHOICES = ("triton", "torch")


def _from_environment() -> str | None:
    choice = os.environ.get("DEIT_FAST_BACKEND") or None
    if choice not in (None, *_CHOICES):
        raise ValueError(f"DEIT_FAST_BACKEND must be 'triton' or 'torch', or unset; got {choice!r}")
    return choice


_forced: str | None = _from_environment()
# Whether exported graphs keep our operators.
_exports_fused = False
# Fallbacks that have been warned of.
said: set[str] = set()
# One for each `fallbacks` block: operators' backwards run in threads of autograd's own, so they belong to none.
_listening: dict[int, dict[str, bool]] = {}


# Products that the vendor's GEMM has computed in this process.
by_vendor = vendor_gemm.used


class Failure(NamedTuple):
    """A call whose kernels did not compile or launch. asked: its arguments' shapes and dtypes."""

    op: str
    asked: str
    device: torch.device
    reason: str


# In this process, by operator and what its launches are remembered by: another shape or device is tried anew.
failed: dict[tuple[str, object], Failure] = {}
_warned: set[tuple[str, str]] = set()


def use_triton(tensor: torch.Tensor) -> bool:
    """Triton on CUDA and ROCm tensors, stock operators elsewhere, unless one of them is forced."""
    if _forced is None:
        return tensor.is_cuda
    return _forced == "triton"


def transparent(tensor: torch.Tensor) -> bool:
    """Whether an operator is nothing but its stock PyTorch form here: on the CPU, unless a backend is forced.

    Autograd, Dynamo and subclasses then find what they find in a stock model. Forced to "torch", stock operators stand
    behind ours, as on a GPU that the kernels can't serve; in a `fused_export` block ours are what is recorded.
    """
    return _forced is None and tensor.device.type == "cpu" and not _exports_fused


def exporting() -> bool:
    """Whether `torch.export` is recording a graph, or decomposing one."""
    return torch.compiler.is_compiling() and torch.compiler.is_exporting()


def exported_as_stock() -> bool:
    """Whether `torch.export` is recording, and shall find stock operators."""
    return not _exports_fused and exporting()


@contextmanager
def fused_export() -> Iterator[None]:
    """Within the block `torch.export` records the fused operators `torch.ops.deit_fast.*` of a model.

    Outside of it an exported graph has stock operators alone, and needs this library nowhere. With the fused ones it
    runs, and loads, where deit_fast has been imported: on Triton where its tensors are on a GPU.
    `ExportedProgram.run_decompositions` puts their stock forms in their places.
    """
    global _exports_fused
    previous, _exports_fused = _exports_fused, True
    try:
        yield
    finally:
        _exports_fused = previous


def no_products(weight: torch.Tensor) -> str | None:
    """Why no kernel multiplies matrices of weight's dtype on its device, or None."""
    return hardware.no_products(weight)


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


@contextmanager
def fallbacks() -> Iterator[dict[str, bool]]:
    """Fills, in order, with the fallbacks to stock operators within the block, whether or not they were warned of.

    True where the kernels don't claim to take such arguments, False where they failed.
    """
    heard: dict[str, bool] = {}
    _listening[id(heard)] = heard
    try:
        yield heard
    finally:
        del _listening[id(heard)]


def warn_fallback(op: str, reason: str) -> None:
    """Says once per operator and reason, or once for what a device lacks, that the stock operators answer."""
    who = "deit_fast" if reason in lacking else f"deit_fast.{op}"
    message = f"{who}: {reason}; using the stock PyTorch operators"
    _tell(message, by_design=True)
    if message not in said:
        said.add(message)
        warnings.warn(message, stacklevel=4)


def _tell(message: str, by_design: bool) -> None:
    for heard in list(_listening.values()):
        heard[message] = by_design


def has_failed(op: str, key: object) -> bool:
    """Whether the kernels failed before for the same call; `fallbacks` then hears of it again."""
    failure = failed.get((op, key))
    if failure is None:
        return False
    message = f"deit_fast.{op}: its kernels failed ({failure.reason}); using the stock PyTorch operators"
    _tell(message, by_design=False)
    return True


def give_up(op: str, key: object, asked: str, device: torch.device, error: Exception) -> None:
    """Leaves a call whose kernels did not compile or launch to the stock operators from here on, and says so once.

    Called while `error` is handled.

    Raises:
        Exception: `error`, or the device's own, where the kernels are not at fault (`raise_if_not_the_kernels`).
    """
    raise_if_not_the_kernels(error, device)
    reason = in_a_line(error)
    # Of several shapes that fail alike, one is enough to report.
    if (op, reason) not in _warned:
        warnings.warn(
            f"deit_fast.{op}: its kernels failed ({reason}) for {asked} on {device}; the stock PyTorch operators "
            f"answer such calls in this process. Please report this with the output of: deit-fast check",
            stacklevel=4,
        )
        _warned.add((op, reason))
    # Only now: where the warning is an error, nothing has fallen back.
    failed[op, key] = Failure(op, asked, device, reason)
    has_failed(op, key)


def raise_if_not_the_kernels(error: Exception, device: torch.device) -> None:
    """
    Raises:
        Exception: `error`, if memory ran out: whoever catches that must see it. The device's own error, if every later
            call on it fails too: some earlier kernel, perhaps not one of ours, has broken the process's context.
    """
    if ran_out_of_memory(error):
        raise error
    lost = device_error(error, device)
    if lost is not None:
        raise lost from (None if lost is error else error)


def device_error(error: Exception, device: torch.device) -> Exception | None:
    """What `device` answers every call with after `error`, None where it goes on working."""
    if device.type != "cuda":
        return None
    if torch.cuda.is_current_stream_capturing():
        # Asking would end the capture, and so has any error of the driver.
        return error if "CUDA" in str(error) or "HIP" in str(error) else None
    try:
        torch.cuda.synchronize(device)
    except Exception as lost:
        return lost
    return None


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
