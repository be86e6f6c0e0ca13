"""A stand-in for Triton's driver: the product's own launches, compiled for any GPU without having one.

    with recording(TARGETS["sm_90"]) as launches:
        model(images)               # tensors on the CPU, the Triton backend forced

Within, `kernel[grid](…)` does on CPU tensors what it does on a GPU's, down to the cubin or hsaco, except that
nothing runs, nor does the vendor's GEMM: outputs keep whatever memory they were given, and drop path keeps no sample.
With `compiling=False` it stops before the compiler, which `compile_launch` then calls, in another process if need be.
Needs a process without TRITON_INTERPRET.
"""

import importlib
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from deit_fast.check.targets import Target
from deit_fast.kernels.drop_path import keep_samples_kernel
from deit_fast.kernels.launching import replay
from deit_fast.kernels.linear import vendor_gemm

_DEVICE = 0
_MAX_THREADS = 1024


@dataclass
class RecordedLaunch:
    """One `kernel[grid](…)`: what it was called with, and what was compiled for it; or why it was not.

    scalars: the numbers among its arguments; metadata: what the kernel tells profilers of the launch.
    function: the kernel, as Triton finds it again; specialization: what Triton compiles it by, as JSON.
    """

    kernel: str
    target: Target
    grid: tuple[int, ...] = ()
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, object] = field(default_factory=dict)
    constexprs: dict[str, object] = field(default_factory=dict)
    function: str = ""
    specialization: str = ""
    compiled: CompiledKernel | None = None
    error: Exception | None = None

    @property
    def key(self) -> tuple[str, str]:
        """Equal for launches of one binary, wherever Triton is installed."""
        # By name: a kernel that moves to another file is the same kernel.
        return self.kernel, json.loads(self.specialization)["key"] if self.specialization else str(self.error)


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

    def __init__(self, target: Target) -> None:
        self.target = target
        self.utils = _Utilities(target)
        self.launcher_cls = lambda source, metadata: lambda *arguments: None

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> object:
        return self.target.gpu

    def get_device_capability(self, device: int = _DEVICE) -> tuple[int, int]:
        return divmod(self.target.gpu.arch, 10) if self.target.gpu.backend == "cuda" else (9, 4)

    def get_current_device(self) -> int:
        return _DEVICE

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _run_and_record(target: Target, launches: list[RecordedLaunch], compiling: bool) -> Callable:
    stock = jit.JITFunction.run
    specialized: dict[tuple[str, str], str] = {}

    def run(self: jit.JITFunction, *args: object, grid: Any, warmup: bool, **kwargs: object) -> object:
        function = f"{self.module}:{self.fn.__qualname__}"
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        constexprs = {name: given[name] for p in self.params if p.is_constexpr and (name := p.name) in given}
        launch = RecordedLaunch(
            self.__name__,
            target,
            grid=(*(grid(given) if callable(grid) else grid), 1, 1)[:3],
            tensors={n: (tuple(a.shape), a.dtype) for n, a in given.items() if isinstance(a, torch.Tensor)},
            scalars={
                n: a for n in self.arg_names if n not in constexprs and isinstance(a := given.get(n), (int, float))
            },
            constexprs=constexprs,
            metadata=self.launch_metadata(grid, SimpleNamespace(name=self.__name__), given)
            if self.launch_metadata
            else {},
            function=function,
        )

        def before_compiling(*, compile: dict, **_: object) -> bool:
            launch.specialization = compile["specialization_data"]
            return not compiling

        try:
            # Where ptxas refuses a kernel, Triton prints all of its PTX.
            with (
                mock.patch.object(triton.knobs.runtime, "jit_cache_hook", before_compiling),
                redirect_stdout(io.StringIO()),
            ):
                launch.compiled = stock(self, *args, grid=grid, warmup=warmup, **kwargs)
        except Exception as error:  # whatever the compiler raises, the other kernels are still wanted
            launch.error = error
        if launch.compiled is not None:
            # A kernel that is in Triton's cache is not specialized again.
            known = (function, launch.compiled.hash)
            launch.specialization = specialized.setdefault(known, launch.specialization)
        launches.append(launch)
        if self is keep_samples_kernel:
            given["kept_ptr"].zero_()  # or stock operators would read whatever memory it was given as indices
        return launch.compiled

    return run


def _kernels() -> Iterable[jit.JITFunction]:
    registry = getattr(jit, "_triton_jit_function_registry", None)
    if registry is not None:
        return registry.values()
    # Triton 3.6 keeps none.
    modules = [module for name, module in sys.modules.items() if name.startswith("deit_fast.kernels.")]
    return [kernel for module in modules for kernel in vars(module).values() if isinstance(kernel, jit.JITFunction)]


def _forget_compiled_kernels() -> None:
    """A kernel compiled for one target would answer for the next."""
    for function in _kernels():
        for kernels, *_ in function.device_caches.values():
            for kernel in kernels.values():
                kernel.module = None  # or its destructor would ask a driver to unload it
        function.device_caches.clear()


@contextmanager
def recording(target: Target, compiling: bool = True) -> Iterator[list[RecordedLaunch]]:
    """Makes `target` the current device within the block; the list fills with its launches, in order.

    A kernel that does not compile is recorded with its error, and one that asks for more shared memory than
    the target has is recorded all the same.
    """
    launches: list[RecordedLaunch] = []
    # Replayed launches would not pass through Triton's.
    with (
        replay.enabled(False),
        current_device(target),
        mock.patch.object(jit.JITFunction, "run", _run_and_record(target, launches, compiling)),
        mock.patch.object(vendor_gemm, "multiply", lambda *_: None),
    ):
        yield launches


def compile_launch(target: Target, function: str, specialization: str) -> CompiledKernel:
    """What `RecordedLaunch.function` and `RecordedLaunch.specialization`, recorded for `target`, compile to."""
    module, name = function.split(":")
    kernel = getattr(importlib.import_module(module), name)
    with current_device(target), redirect_stdout(io.StringIO()):
        return kernel.preload(specialization)


@contextmanager
def current_device(target: Target) -> Iterator[None]:
    """Makes `target` the current device within the block; launches on it are compiled and do nothing.

    Raises:
        RuntimeError: Triton interprets kernels here.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled; unset it")
    previous = driver._active
    _forget_compiled_kernels()
    replay.forget()
    driver.set_active(_Driver(target))
    try:
        with mock.patch.object(triton.compiler.compiler, "max_shared_mem", lambda device: 2**31):
            yield
    finally:
        _forget_compiled_kernels()
        replay.forget()
        driver._active = previous
