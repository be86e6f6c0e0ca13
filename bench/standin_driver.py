"""A stand-in for Triton's driver: the product's own launches, compiled for any GPU without having one.

    with recording(TARGETS["sm_90"]) as launches:
        model(images)               # tensors on the CPU, the Triton backend forced

Within, `kernel[grid](…)` does on CPU tensors what it does on a GPU's, down to the cubin or hsaco, except that
nothing runs: outputs keep whatever memory they were given. Needs a process without TRITON_INTERPRET.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from bench.targets import Target

_DEVICE = 0
_MAX_THREADS = 1024


@dataclass
class Launch:
    """One `kernel[grid](…)`: what it was called with, and what was compiled for it; or why it was not."""

    kernel: str
    target: Target
    grid: tuple[int, ...] = ()
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    constexprs: dict[str, object] = field(default_factory=dict)
    signature: dict[str, str] = field(default_factory=dict)
    compiled: CompiledKernel | None = None
    error: Exception | None = None

    @property
    def key(self) -> str:
        """Equal for launches of one binary."""
        return self.compiled.hash if self.compiled else f"{self.kernel}: {self.error}"


class _Utilities:
    """What Triton asks its driver about a device and a binary."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_device_properties(self, device: int) -> dict:
        return {
            "arch": self.target.gpu.arch,
            "warpSize": self.target.gpu.warp_size,
            "max_shared_mem": self.target.shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": self.target.multiprocessors,
        }

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        module, function, registers, spills = object(), 0, 0, 0
        return module, function, registers, spills, _MAX_THREADS

    def unload_module(self, module: object) -> None:
        pass


class _Driver:
    """The interface of `triton.backends.driver.DriverBase` that compiling and launching use."""

    def __init__(self, target: Target, launches: list[Launch]) -> None:
        self.target = target
        self.utils = _Utilities(target)
        self.launcher_cls = lambda source, metadata: _launcher(target, launches, source)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self):
        return self.target.gpu

    def get_device_capability(self, device: int = _DEVICE) -> tuple[int, int]:
        return divmod(self.target.gpu.arch, 10) if self.target.gpu.backend == "cuda" else (9, 4)

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _launcher(target: Target, launches: list[Launch], source):
    function = source.fn
    names = function.arg_names
    compiled = next(k for k in function.device_caches[_DEVICE][0].values() if k.src is source)
    constexprs = {names[path[0]]: value for path, value in source.constants.items()}

    def launch(grid_x, grid_y, grid_z, stream, binary, packed, metadata, enter_hook, exit_hook, *args):
        tensors = {
            name: (tuple(argument.shape), argument.dtype)
            for name, argument in zip(names, args, strict=True)
            if isinstance(argument, torch.Tensor)
        }
        grid = (grid_x, grid_y, grid_z)
        launches.append(Launch(function.__name__, target, grid, tensors, constexprs, source.signature, compiled))

    return launch


def _run_or_record_error(target: Target, launches: list[Launch]):
    stock = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        try:
            # Where ptxas refuses a kernel, Triton prints all of its PTX.
            with redirect_stdout(io.StringIO()):
                return stock(self, *args, grid=grid, warmup=warmup, **kwargs)
        except Exception as error:  # whatever the compiler raises, the other kernels are still wanted
            launches.append(Launch(self.__name__, target, error=error))
            return None

    return run


def _forget_compiled_kernels() -> None:
    """A kernel compiled for one target would answer for the next."""
    for function in jit._triton_jit_function_registry.values():
        for kernels, *_ in function.device_caches.values():
            for kernel in kernels.values():
                kernel.module = None  # or its destructor would ask a driver to unload it
        function.device_caches.clear()


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Makes `target` the current device within the block; the list fills with its launches, in order.

    A kernel that does not compile is recorded with its error, and one that asks for more shared memory than
    the target has is recorded all the same.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    launches: list[Launch] = []
    previous = driver._active
    _forget_compiled_kernels()
    driver.set_active(_Driver(target, launches))
    try:
        with (
            mock.patch.object(triton.compiler.compiler, "max_shared_mem", lambda device: 2**31),
            mock.patch.object(jit.JITFunction, "run", _run_or_record_error(target, launches)),
        ):
            yield launches
    finally:
        _forget_compiled_kernels()
        driver._active = previous
