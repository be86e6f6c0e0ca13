"""Step 2: the kernels that the other steps need, compiled on all cores before they are waited for.

They are recorded on CPU tensors through the stand-in for Triton's driver and compiled into Triton's cache, where the
other steps find them.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from queue import SimpleQueue

import torch
import triton
from triton.backends.compiler import GPUTarget

from deit_fast.check.standin_driver import compile_launch, recording
from deit_fast.check.targets import TARGETS, Target
from deit_fast.ops import backend

CPU = torch.device("cpu")
# Models at batch 256 take memory to record, and little time.
_RECORDERS = 4
_SECONDS = 200.0
_SPAWN = get_context("spawn")


@dataclass(frozen=True)
class LaunchRecipe:
    """`function(CPU, *arguments)` makes the launches of a task."""

    function: Callable[..., object]
    arguments: tuple


# A kernel as Triton finds it again, and what it is compiled by.
Kernel = tuple[str, str]


def target_of(device: torch.device) -> Target:
    """The GPU as the stand-in knows it: from the table, or by what PyTorch says of it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
        gpu = GPUTarget("hip", name, properties.warp_size)
    else:
        name = f"sm_{properties.major}{properties.minor}"
        gpu = GPUTarget("cuda", 10 * properties.major + properties.minor, 32)
    if name in TARGETS:
        # Cards of one architecture have more multiprocessors or fewer, and launches go by that.
        return replace(TARGETS[name], multiprocessors=properties.multi_processor_count)
    shared = getattr(properties, "shared_memory_per_block_optin", 64 * 1024)
    return Target(name, gpu, shared, 255, properties.multi_processor_count, shared, 48, 16)


def compile_all(
    device: torch.device, recipes: tuple[LaunchRecipe, ...], seconds: float = _SECONDS
) -> dict[str, object]:
    """How many kernels were compiled, by how many processes; what failed → why; how many are left for want of time."""
    ends = time.monotonic() + seconds
    target = target_of(device)
    cores = len(os.sched_getaffinity(0))
    waiting: SimpleQueue[Kernel | None] = SimpleQueue()
    with (
        ProcessPoolExecutor(min(_RECORDERS, cores), mp_context=_SPAWN) as recorders,
        ThreadPoolExecutor(cores) as threads,
    ):
        compilers = [threads.submit(_compile_those, target, waiting, ends) for _ in range(cores)]
        found: set[Kernel] = set()
        failed: dict[str, str] = {}
        for recorded in as_completed([recorders.submit(_record, target, recipe) for recipe in recipes]):
            kernels, reasons = _outcome(recorded)
            failed |= reasons
            for kernel in kernels - found:
                waiting.put(kernel)
            found |= kernels
        for _ in compilers:
            waiting.put(None)
        done = [compiler.result() for compiler in compilers]
    for _, reasons in done:
        failed |= reasons
    compiled = sum(count for count, _ in done)
    return {"kernels": compiled, "processes": cores, "failed": failed, "left": len(found) - compiled - len(failed)}


def _outcome(recorded: Future) -> tuple[set[Kernel], dict[str, str]]:
    try:
        return recorded.result()
    except BrokenProcessPool as error:
        return set(), {"a recorder": backend.in_a_line(error)}


def _record(target: Target, recipe: LaunchRecipe) -> tuple[set[Kernel], dict[str, str]]:
    """What a recipe's launches are compiled by; why it came to no end. Runs in a process of a pool."""
    torch.set_num_threads(1)
    failed: dict[str, str] = {}
    with warnings.catch_warnings(), backend.forced("triton"), recording(target, compiling=False) as launches:
        warnings.simplefilter("ignore")
        try:
            recipe.function(CPU, *recipe.arguments)
        except Exception as error:  # the other recipes are still wanted
            failed[f"{recipe.function.__name__}{recipe.arguments}"] = backend.in_a_line(error)
    return {(each.function, each.specialization) for each in launches if each.specialization}, failed


def _compile_those(target: Target, waiting: SimpleQueue, ends: float) -> tuple[int, dict[str, str]]:
    """How many were compiled; what failed → why. In a process of this thread's own, which a compiler may abort."""
    compiled, failed = 0, {}
    pool = ProcessPoolExecutor(1, mp_context=_SPAWN)
    for function, specialization in _until_none(waiting):
        if time.monotonic() > ends:
            continue
        try:
            pool.submit(_compile, target, function, specialization).result()
            compiled += 1
        except Exception as error:  # the other kernels are still wanted
            failed[function] = backend.in_a_line(error)
            if isinstance(error, BrokenProcessPool):
                pool = ProcessPoolExecutor(1, mp_context=_SPAWN)
    pool.shutdown()
    return compiled, failed


def _until_none(waiting: SimpleQueue) -> Iterator[Kernel]:
    return iter(waiting.get, None)


def _compile(target: Target, function: str, specialization: str) -> None:
    kernel = compile_launch(target, function, specialization)
    # Until 3.7 Triton compiles the launcher of each signature too, with a C compiler and CUDA's driver.
    if triton.__version__.startswith("3.6.") and target.gpu.backend == "cuda":
        from triton.backends.nvidia.driver import CudaLauncher

        with suppress(Exception):
            CudaLauncher(kernel.src, kernel.metadata)
