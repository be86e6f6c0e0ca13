"""Step 2: the kernels that the other steps need, compiled on all cores before they are waited for.

They are recorded on CPU tensors through the stand-in for Triton's driver and compiled into Triton's cache, where the
other steps find them.
"""

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

import torch
from triton.backends.compiler import GPUTarget

from deit_fast.benchmark.standin_driver import compile_launch, recording
from deit_fast.benchmark.targets import TARGETS, Target
from deit_fast.ops import backend

CPU = torch.device("cpu")
# Of a process that records DeiT-B's training step at batch 256.
_MEMORY = 5 * 2**30


@dataclass(frozen=True)
class Recipe:
    """`function(CPU, *arguments)` makes the launches of a task."""

    function: Callable[..., object]
    arguments: tuple


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


def compile_all(device: torch.device, recipes: tuple[Recipe, ...]) -> dict[str, object]:
    """How many kernels were compiled and by how many processes; what did not compile → why."""
    target = target_of(device)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores = max(1, min(len(recipes), os.cpu_count() or 1, memory // _MEMORY))
    compiled: set[str] = set()
    failed: dict[str, str] = {}
    with ProcessPoolExecutor(cores, mp_context=get_context("spawn")) as pool:
        for kernels, reasons in pool.map(_compile, [(target, recipe) for recipe in recipes]):
            compiled |= kernels
            failed |= reasons
    return {"kernels": len(compiled), "processes": cores, "failed": failed}


def _compile(work: tuple[Target, Recipe]) -> tuple[set[str], dict[str, str]]:
    """What one recipe's launches are compiled by; those that don't compile → why. Runs in a process of the pool."""
    target, recipe = work
    torch.set_num_threads(1)
    compiled: set[str] = set()
    failed: dict[str, str] = {}
    with warnings.catch_warnings(), backend.forced("triton"), recording(target, compiling=False) as launches:
        warnings.simplefilter("ignore")
        try:
            recipe.function(CPU, *recipe.arguments)
        except Exception as error:  # nothing runs here, so what follows the launches may well fail
            failed[recipe.function.__name__] = backend.in_a_line(error)
        found = {launch.key: launch for launch in launches if launch.specialization}
    for launch in found.values():
        try:
            compile_launch(target, launch.function, launch.specialization)
            compiled.add("".join(launch.key))
        except Exception as error:  # the other kernels are still wanted
            failed[launch.kernel] = backend.in_a_line(error)
    return compiled, failed
