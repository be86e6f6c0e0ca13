"""A GPU that says what it is, and has nothing else."""

from types import SimpleNamespace

import pytest
import torch

from deit_fast.check import environment


def describe_one(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """PyTorch and the driver's own tool answer for the device that is returned."""
    properties = SimpleNamespace(
        name="Stand-in", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, gcnArchName="gfx942"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        environment.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.95.05\n580.95.05\n")
    )
    return torch.device("cuda", 0)
