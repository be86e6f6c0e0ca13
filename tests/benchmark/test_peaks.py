import pytest
import torch

from deit_fast.benchmark import peaks
from deit_fast.benchmark.peaks import Peaks

CPU = torch.device("cpu")


class Clock:
    """Every call takes a tenth of a second."""

    def calls(self, call) -> int:
        return 1

    def seconds(self, call, calls: int) -> float:
        call()
        return 0.1


def test_the_bound_is_the_longer_of_computing_and_moving():
    found = Peaks({"bfloat16": 1e12}, 1e9, "")
    assert found.bound("bfloat16", 10**12, 10**6) == 1.0
    assert found.bound("bfloat16", None, 2 * 10**9) == 2.0
    assert found.bound("float32", 1, 1) is None


def test_a_cpu_has_no_data_sheet():
    assert peaks.published(CPU) is None


@pytest.mark.parametrize(("tf32", "rate"), [(False, 989 / 2 / 3), (True, 989 / 2)])
def test_a_gpus_peaks_are_its_data_sheets(monkeypatch, tf32, rate):
    """float32 as the kernels multiply it: three TF32 products, or one where the user allows it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        found = peaks.published(torch.device("cuda"))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert found.flops == pytest.approx({"float32": 1e12 * rate, "bfloat16": 989.5e12, "float16": 989.5e12})
    assert found.bandwidth == 3350e9


def test_measured_peaks_are_a_products_and_a_copys(monkeypatch):
    monkeypatch.setattr(peaks, "_SIDE", {"cpu": 16})
    monkeypatch.setattr(peaks, "_COPIED", {"cpu": 1000})
    found = peaks.measured(CPU, ["float32", "bfloat16"], Clock())
    assert found.flops == pytest.approx({"float32": 2 * 16**3 / 0.1, "bfloat16": 2 * 16**3 / 0.1})
    assert found.bandwidth == pytest.approx(20_000)
