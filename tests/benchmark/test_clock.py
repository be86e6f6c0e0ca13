import pytest
import torch

from deit_fast.benchmark import clock
from deit_fast.benchmark.clock import CpuClock, GpuClock, interval


def test_a_medians_interval_is_that_of_order_statistics():
    # 9 values: the 2nd and the 8th, 96 %. 20: the 6th and the 15th, 96 %.
    assert interval([float(v) for v in range(9, 0, -1)]) == (5.0, 2.0, 8.0)
    assert interval([float(v) for v in range(1, 21)]) == (10.5, 6.0, 15.0)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_values_exclude_none(n):
    values = [float(v) for v in range(n)]
    assert interval(values)[1:] == (values[0], values[-1])


def test_on_a_cpu_a_timing_is_of_many_short_calls():
    made = []
    cpu = CpuClock()
    calls = cpu.calls(lambda: made.append(1))
    assert calls > 100
    made.clear()
    assert cpu.seconds(lambda: made.append(1), calls) > 0
    assert len(made) == calls


def test_on_a_gpu_every_call_is_between_its_own_events_behind_a_flushed_cache(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 3.0  # ms

    class Cache:
        def zero_(self) -> None:
            log.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(clock.torch, "empty", lambda *_, **__: Cache())
    gpu = GpuClock(torch.device("cuda"))
    assert gpu.seconds(lambda: log.append("call"), 2) == pytest.approx(3e-3)
    assert log == [*["flush", "event", "call", "event"] * 2, "wait"]
    assert gpu.calls(lambda: None) == round(clock._LEAST_SECONDS / 3e-3)
