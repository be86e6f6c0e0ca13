import subprocess
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace

import pytest
import timm
import torch

from deit_fast.benchmark import provenance as module
from deit_fast.benchmark.provenance import processor, provenance


def test_a_cpus_names_threads_and_16_bit_instructions():
    found = provenance(torch.device("cpu"))
    assert f"{torch.get_num_threads()} threads" in found["device"]
    assert "deit_fast multiplies bfloat16 matrices in" in found["device"]
    assert found["device"].split(";")[0] == processor().split(";")[0]
    assert found["command"].startswith("deit-fast")
    assert found["torch"].startswith(torch.__version__)


def test_the_date_and_the_versions_of_what_took_part():
    found = provenance(torch.device("cpu"), ["timm", "no_such_package"])
    assert found["timm"] == timm.__version__
    assert "no_such_package" not in found and "transformers" not in found
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["date"])
    assert timedelta(0) <= age < timedelta(minutes=1)


def test_outside_a_clone_the_package_is_called_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    assert module._commit() == "an installed package"


@pytest.mark.parametrize("works", [True, False])
def test_a_gpus_clocks_are_asked_of_the_driver_by_its_identity(works, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        if not works:
            raise subprocess.CalledProcessError(9, command)
        return SimpleNamespace(stdout="1410 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"1b{index}"))
    said = module._clocks(torch.device("cuda", 1))
    assert asked[0][-1] == "--id=GPU-1b1"
    assert said.endswith("1410 MHz, 1980 MHz, 2619 MHz, 700.00 W") if works else said == "unknown"
