"""How a kernel is launched, and what was launched recorded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from triton.runtime import JITFunction, driver

from deit_fast.kernels.launching import memory

_thread = threading.local()


class Recorded(NamedTuple):
    """A launch that `run` has made: the arguments in the kernel's order; `compiled` is None in the interpreter."""

    compiled: Any  # Triton's CompiledKernel
    programs: int
    arguments: tuple
    device: int


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The list fills with this thread's launches within the block; a block around it has them afterwards."""
    outer = getattr(_thread, "launches", None)
    inner: list[Recorded] = []
    _thread.launches = inner
    try:
        yield inner
    finally:
        _thread.launches = outer
        if outer is not None:
            outer += inner


def run(kernel: JITFunction, programs: int, device: torch.device, *args: object, **options: object) -> None:
    """Launches `programs` programs on the tensors' own device (Triton would take the current one)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, programs, args, options)
    else:
        _run(kernel, programs, args, options)


def _run(kernel: JITFunction, programs: int, args: tuple, options: dict) -> None:
    compiled = memory.with_scratch(kernel[(programs,)])(*args, **options)
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        arguments = tuple(given[name] for name in kernel.arg_names)
        launches.append(Recorded(compiled, programs, arguments, driver.active.get_current_device()))
