"""What a report says of the machine, whatever the machine answers."""

import subprocess

import pytest
import torch

from deit_fast.check import environment
from tests.support.described_gpu import describe_one


def test_an_amd_gpu_is_described_by_its_own_names(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    found = environment.environment(describe_one(monkeypatch))
    assert "gfx942" in found["device"] and "ROCm 7.2" in found["torch"]
    assert found["driver"] == "unknown" or found["driver"].startswith("amdgpu ")


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_a_driver_that_does_not_say_its_version_is_unknown(monkeypatch, error):
    def failing(*_, **__):
        raise error

    device = describe_one(monkeypatch)
    monkeypatch.setattr(environment.subprocess, "run", failing)
    assert environment.environment(device)["driver"] == "unknown"
