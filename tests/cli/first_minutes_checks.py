"""Runs `deit-fast gpu` whole as on a GPU, on stand-ins for all that takes one: CPU tensors for the device's, Triton's
driver, torch.cuda, CUDA graphs and clocks. Kernels are compiled, and nothing runs.

Prints what it did, as JSON for `test_gpu`. A program of its own because the test process has TRITON_INTERPRET set.
"""

import io
import json
import os
import sys
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from triton.compiler.compiler import ASTSource

from deit_fast.benchmark import clock, peaks, profile, tune
from deit_fast.benchmark.gpu import compiling, run, steps
from deit_fast.check.cases import Size
from deit_fast.check.standin_driver import current_device
from deit_fast.check.targets import TARGETS
from deit_fast.check.workers import run_tasks_here
from deit_fast.cli.main import main as deit_fast
from deit_fast.models.registry import get_config
from deit_fast.ops import backend
from tests.support.cuda_as_cpu import cuda_as_cpu

NAME = "sm_90"
# What would need an extra.
ABSENT = ("timm", "transformers", "rich", "matplotlib")


class Clock:
    """A second for a call of stock, half of one for ours: whichever is asked first is not the slower for it."""

    def __init__(self, device: torch.device) -> None: ...

    def calls(self, call) -> int:
        call()
        return 1

    def seconds(self, call, calls: int) -> float:
        return graph_seconds(call)


def graph_seconds(call) -> float:
    call()
    return 1e-3


class Graph:
    def replay(self) -> None: ...


def small() -> steps.Scope:
    size = Size.of_model(64, 1, 32, 16, 10, 2)
    config = replace(get_config("deit_tiny_distilled_patch16_224"), embed_dim=64, num_heads=1, img_size=32, depth=3)
    return steps.Scope((size,), (64,), {"tiny": config}, size.tokens, 2)


@contextmanager
def a_gpu():
    """Everything that asks for one finds one."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    stream = SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)
    with ExitStack() as stack:
        for name, stand_in in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "max_memory_allocated": lambda device: 12345,
            "reset_peak_memory_stats": lambda device: None,
            "synchronize": lambda *device: None,
            "Stream": lambda *device: stream,
            "current_stream": lambda *device: stream,
            "stream": lambda stream: nullcontext(),
            "graph": lambda graph, stream: nullcontext(),
            "CUDAGraph": Graph,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        stack.enter_context(current_device(TARGETS[NAME]))
        stack.enter_context(mock.patch.object(clock, "GpuClock", Clock))
        stack.enter_context(mock.patch.object(clock, "graph_seconds", graph_seconds))
        stack.enter_context(mock.patch.dict(peaks._SIDE, cuda=16))
        stack.enter_context(mock.patch.dict(peaks._COPIED, cuda=16))
        stack.enter_context(mock.patch.object(profile, "profiled", lambda step: step() or []))
        # Every candidate would be compiled.
        stack.enter_context(mock.patch.object(tune, "neighbours", lambda asked, setting: ()))
        stack.enter_context(mock.patch.object(tune, "leads_elsewhere", lambda asked: False))
        stack.enter_context(mock.patch.object(torch.nn.Module, "compile", lambda self, dynamic: None))
        # A worker would not find what stands in here.
        stack.enter_context(
            mock.patch.object(run, "run_tasks", lambda function, tasks, seconds: run_tasks_here(function, tasks))
        )
        stack.enter_context(mock.patch.object(steps, "scope", lambda memory: small()))
        stack.enter_context(mock.patch.object(steps, "NEEDED", ("linear_residual",)))
        stack.enter_context(mock.patch.object(steps, "OPS", ("linear_residual", "attention")))
        stack.enter_context(mock.patch.dict(sys.modules, dict.fromkeys(ABSENT)))
        stack.enter_context(backend.forced("triton"))
        stack.enter_context(cuda_as_cpu())
        yield


@contextmanager
def compiled_later():
    """The list fills with the kernels that are compiled in this process after the compile step."""
    found: list[str] = []
    make_ir, compile_all = ASTSource.make_ir, compiling.compile_all

    def noted(self, *args, **kwargs):
        found.append(self.fn.__name__)
        return make_ir(self, *args, **kwargs)

    def step(*args):
        # However slow this machine is.
        result = compile_all(*args, seconds=3600)
        found.clear()
        return result

    with mock.patch.object(ASTSource, "make_ir", noted), mock.patch.object(compiling, "compile_all", step):
        yield found


def main() -> None:
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory() as folder,
        # What was compiled on this machine before would hide what the compile step forgets.
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": str(Path(folder, "triton"))}),
        a_gpu(),
        compiled_later() as compiled,
    ):
        found = {}
        for name in ("first", "second"):
            with redirect_stdout(io.StringIO()) as printed:
                code = deit_fast(["gpu", "--out", folder])
            found[name] = {"code": code, "printed": printed.getvalue()}
        found["results"] = json.loads(Path(folder, "results.json").read_text())
        found["summary"] = Path(folder, "summary.md").read_text()
        found["tuned"] = sorted(file.name for file in Path(folder, "tuned").glob("*.json"))
    print(json.dumps({**found, "compiled later": compiled}))


if __name__ == "__main__":
    main()
