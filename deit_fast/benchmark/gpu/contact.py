"""Step 1: the machine, the most it can do, one operator, and whether launches are repeated from plans."""

import os
from dataclasses import asdict

import torch

from deit_fast import ops
from deit_fast.benchmark import clock, peaks
from deit_fast.check.cases import Size, cases
from deit_fast.check.environment import environment as described
from deit_fast.check.operators import CheckTask, check_task, evaluate
from deit_fast.kernels.launching import replay, run


def environment(device: torch.device) -> dict[str, object]:
    properties = torch.cuda.get_device_properties(device)
    return {
        **described(device),
        "cores": os.cpu_count(),
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
    }


def measured_peaks(device: torch.device) -> dict[str, object]:
    """FLOP/s of a square product in bfloat16, bytes/s of a copy."""
    return asdict(peaks.measured(device, ["bfloat16"], clock.GpuClock(device)))


def one_operator(device: torch.device, size: Size) -> dict[str, object]:
    """A linear layer with a residual, forward and backward, against float64."""
    return checked(device, "linear_residual", size, torch.bfloat16)


def checked(device: torch.device, op: str, size: Size, dtype: torch.dtype) -> dict[str, object]:
    """`deit-fast check` of one operator: how many results, those that fail, and fallbacks to stock operators."""
    lines = check_task(CheckTask(op, size, dtype, device), lambda title: None)
    return {
        "results": len(lines),
        "failed": [{**asdict(line), "said": str(line)} for line in lines if line.failure],
        "fallbacks": sorted({reason for line in lines for reason in line.fallbacks}),
    }


def launch_cases(device: torch.device, op: str, size: Size, dtype: torch.dtype) -> None:
    """Makes the launches of `checked`, for their kernels to be compiled."""
    for case in cases(op, size, dtype, device):
        evaluate(case, dtype, "triton")


def plans(device: torch.device, size: Size) -> dict[str, object]:
    """How many launches of a call's first, second and third time go through Triton: 1, 0, 0 if plans are repeated."""
    x = torch.randn(size.batch, size.tokens, size.width, device=device, dtype=torch.bfloat16)
    weight = torch.randn(size.width, size.width, device=device, dtype=torch.bfloat16)
    through_triton = []
    with torch.no_grad():
        for _ in range(3):
            with run.recorded() as launches:
                ops.linear(x, weight)
            through_triton.append(len(launches))
    return {"launches through Triton": through_triton, "runner is known": replay.RUNNER_IS_KNOWN}
