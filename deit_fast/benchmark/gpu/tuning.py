"""Step 6: with the time that is left, better settings, a profile, and what NVIDIA's own profiler says."""

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

import torch

from deit_fast.benchmark import clock, profile
from deit_fast.benchmark.gpu.blocks import Shape
from deit_fast.benchmark.gpu.launches import operators
from deit_fast.benchmark.gpu.models import model_step
from deit_fast.benchmark.tune import tune
from deit_fast.kernels.launching import hardware, tuned
from deit_fast.models.config import DeiTConfig

_ROUNDS = 5
# After which no other setting is tried: a backward operator has dozens, and each is compiled.
_SECONDS = 90.0
_NCU_SECONDS = 120


def tune_operator(device: torch.device, shape: Shape, place: int) -> dict[str, object]:
    """The fastest settings of one operator of a block's step; written where tuned settings are kept."""
    case = operators(device, shape)[place]
    ends = time.monotonic() + _SECONDS
    result = next(tune([case], clock.GpuClock(device), _ROUNDS, lambda what: None, ends))
    found = {"operator": case.operator.name, "shape": case.shape, "batch": case.batch, "failure": result.failure}
    if result.failure is not None:
        return found
    name, driver = hardware.device_name(device), hardware.driver_version()
    file = tuned.write(case.operator.name, case.shape, name, driver, case.batch, result.choice)
    stock = {"runs": "stock"} if result.choice.stock else {"settings": result.choice.settings}
    return {**found, **stock, "seconds": result.seconds, "tried": result.tried, "file": file.name}


def profiled_model(device: torch.device, config: DeiTConfig, batch: int, training: bool) -> list[dict[str, object]]:
    """Where our model's step spends its time, by kernel, the longest first."""
    return [asdict(each) for each in profile.profiled(model_step(device, config, batch, training))]


def nsight(device: torch.device, shape: Shape, symbol: str) -> dict[str, object]:
    """What Nsight Compute says of one launch of the kernel `symbol` in a block's step; or that it is not there."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"absent": "ncu is not installed"}
    code = (
        "import torch; from deit_fast.benchmark.gpu.blocks import Shape, launch_block; "
        f"launch_block(torch.device({str(device)!r}), {shape!r})"
    )
    command = [ncu, "--set", "basic", "--clock-control", "none", "--launch-count", "1", "--kernel-name", symbol]
    with tempfile.TemporaryFile("w+") as said:
        done = subprocess.run([*command, sys.executable, "-c", code], stdout=said, stderr=said, timeout=_NCU_SECONDS)
        said.seek(0)
        return {"exit code": done.returncode, "said": said.read()[-6000:]}
