"""Runs `deit-fast tune` and `deit-fast bench` as on a GPU, on stand-ins for all that takes one: CPU tensors for the
device's, Triton's driver, torch.cuda, the profiler, CUDA graphs, and a clock with its own taste.

Prints what they did, as JSON for `test_on_a_gpu`. A program of its own because the test process has TRITON_INTERPRET
set.
"""

import io
import json
import os
import tempfile
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import timm
import torch
from triton.runtime import jit

from deit_fast.benchmark import clock, measure, operators, peaks, tasks
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.cli.main import main as deit_fast
from deit_fast.kernels import mlp
from deit_fast.kernels.launching import hardware
from deit_fast.ops import backend
from tests.support.cuda_as_cpu import cuda_as_cpu

CASE = ["--models", "deit_tiny_distilled_patch16_224", "--img-size", "32", "--batch", "2", "--dtype", "bfloat16"]
# As the stand-in for the driver names its device; as a GPU is called, which no file can be.
NAME, GPU = "sm_90", "NVIDIA H100/80GB: HBM3 (MIG 1g.10gb) " + 100 * "™"
PEAK = 12345
PEERS = "timm;timm, compiled max-autotune;deit_fast;deit_fast, tuned;deit_fast, CUDA graphs"
# Rows of linear_kernel's tiles that spill, and that compute something else.
SPILLS, WRONG = 16, 64


def zeroed(allocate):
    """New memory is zero, as no kernel writes it; within operators too, where no mode is asked."""
    return lambda *args, **kwargs: allocate(*args, **kwargs).zero_()


class Clock:
    """Likes what spills, then what is wrong, then steps of 32, before all other tiles, and the kernels before stock."""

    launches: list
    timed: set
    # A kernel whose timing takes more memory than there is.
    too_large = ""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"

    def calls(self, call) -> int:
        call()
        return 1

    def seconds(self, call, calls: int) -> float:
        self.launches.clear()
        call()
        if any(each.kernel == self.too_large for each in self.launches):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        tastes = [self._taste(each) for each in self.launches] or [2.0]
        return sum(tastes) / len(tastes)

    def _taste(self, each) -> float:
        if each.kernel != "linear_kernel":
            return 1.0
        rows, depth = each.constexprs["ROW_BLOCK"], each.constexprs["DEPTH_BLOCK"]
        self.timed.add((rows, depth))
        return {SPILLS: 0.1, WRONG: 0.2}.get(rows, 0.5 if depth == 32 else 1.0)


class Profiler:
    """Has seen every launch take a microsecond."""

    launches: list

    def __init__(self, activities) -> None:
        assert activities == [torch.profiler.ProfilerActivity.CUDA]

    def __enter__(self) -> "Profiler":
        self.launches.clear()
        return self

    def __exit__(self, *exception) -> None: ...

    def events(self) -> list:
        gpu = torch.autograd.DeviceType.CUDA
        return [
            SimpleNamespace(
                name=each.kernel, device_type=gpu, time_range=SimpleNamespace(start=i, elapsed_us=lambda: 1.0)
            )
            for i, each in enumerate(self.launches)
        ]


def compiled(launches: list):
    """What a launch gives: a kernel that spills or does not. A wrong one has written."""
    record = jit.JITFunction.run

    def run(self, *args, **options):
        record(self, *args, **options)
        rows = launches[-1].constexprs["ROW_BLOCK"] if self.__name__ == "linear_kernel" else None
        if rows == WRONG:
            (dict(zip(self.arg_names, args, strict=False)) | options)["y_ptr"].fill_(1)
        return SimpleNamespace(n_spills=8 * (rows == SPILLS))

    return mock.patch.object(jit.JITFunction, "run", run)


@contextmanager
def a_gpu(modes: list):
    """Everything that asks for one finds one. `modes` fills with those that models are compiled in."""
    create = timm.create_model
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, uuid="0"
    )
    with ExitStack() as stack:
        for name, stand_in in {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_name": lambda device: NAME,
            "get_device_properties": lambda device: properties,
            "max_memory_allocated": lambda device: PEAK,
            "reset_peak_memory_stats": lambda device: None,
            "synchronize": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stand_in))
        # It takes DeiT-Ti's MLP whole.
        stack.enter_context(mock.patch.object(mlp, "_ARCHITECTURES", frozenset({NAME})))
        launches = stack.enter_context(recording(TARGETS[NAME], compiling=False))
        stack.enter_context(compiled(launches))
        Clock.launches, Clock.timed, Profiler.launches = launches, set(), launches
        stack.enter_context(mock.patch.object(hardware, "device_name", lambda device: GPU))
        stack.enter_context(mock.patch.object(clock, "GpuClock", Clock))
        stack.enter_context(mock.patch.object(torch.profiler, "profile", Profiler))
        # A worker would not find what stands in here.
        stack.enter_context(mock.patch.object(tasks, "run_tasks", tasks.run_tasks_here))
        stack.enter_context(
            mock.patch.object(torch.nn.Module, "compile", lambda self, mode, dynamic: modes.append(mode))
        )
        # Nothing runs here, so nothing is right.
        for module in (measure, operators):
            stack.enter_context(mock.patch.object(module, "refuse_wrong", lambda *_: None))
        stack.enter_context(mock.patch.dict(peaks._SIDE, cuda=16))
        stack.enter_context(mock.patch.dict(peaks._COPIED, cuda=16))
        stack.enter_context(
            mock.patch.object(timm, "create_model", lambda name, **options: create(name, depth=1, **options))
        )
        stack.enter_context(backend.forced("triton"))
        for name in ("empty", "empty_like"):
            stack.enter_context(mock.patch.object(torch, name, zeroed(getattr(torch, name))))
        stack.enter_context(cuda_as_cpu())
        yield


def run(*arguments: str) -> dict:
    """The command's exit code and what it printed."""
    with redirect_stdout(io.StringIO()) as printed:
        code = deit_fast([*arguments[:1], *CASE, *arguments[1:]])
    return {"code": code, "printed": " ".join(printed.getvalue().split())}


def files(folder: Path) -> dict:
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    assert {content["device"] for content in found} == {GPU}
    return {content["operator"]: content for content in found}


def main() -> None:
    torch.set_num_threads(1)
    modes: list = []
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DEIT_FAST_TUNED": str(Path(folder, "tuned")), "COLUMNS": "400"}),
        a_gpu(modes),
    ):
        tuned, out = Path(folder, "tuned"), Path(folder, "out")
        with mock.patch.object(Clock, "too_large", "mlp_kernel"):
            tune = {**run("tune", "--suite", "model"), "files": files(tuned), "timed": sorted(Clock.timed)}
        arguments = ("--rounds", "1", "--out", str(out))
        bench = {
            **run("bench", "--suite", "model", "--profile", "--measure-peaks", "--peers", PEERS, *arguments),
            "files": files(tuned),
            "results": json.loads((out / "results.json").read_text()),
            "page": (out / "results.md").read_text(),
            "modes": modes,
        }
        again = run("bench", "--suite", "model", "--peers", "deit_fast, tuned", *arguments[:-1], str(out / "again"))
        ops = run("bench", "--suite", "ops", "--no-tune", *arguments[:-1], str(out / "ops"))
        ops["rows"] = json.loads((out / "ops" / "results.json").read_text())["operators"]
    print(json.dumps({"tune": tune, "bench": bench, "again": again, "ops": ops}))


if __name__ == "__main__":
    main()
