from types import SimpleNamespace

import pytest
import torch

from deit_fast.benchmark import profile
from deit_fast.benchmark.profile import KernelTime, by_kernel

METADATA = [
    {"name": "linear 4x8x8 bf16 bias", "symbol": "linear_kernel_bias_64x64x32", "flops16": 100, "bytes": 10},
    {"name": "stock_kernel", "flops16": 50, "bytes": 20},
    {"name": "linear 4x8x16 bf16 bias", "symbol": "linear_kernel_bias_64x64x32", "flops16": 300, "bytes": 30},
]
KERNELS = [
    ("linear_kernel_bias_64x64x32", 1.0), ("copy", 0.5), ("stock_kernel", 4.0), ("linear_kernel_bias_64x64x32", 2.0),
]  # fmt: skip


def test_launches_of_one_kernel_are_told_apart_by_their_shapes():
    assert by_kernel(KERNELS * 2, METADATA * 2, steps=2) == [
        KernelTime("stock_kernel", 1, 4.0, 50, 20),
        KernelTime("linear 4x8x16 bf16 bias", 1, 2.0, 300, 30),
        KernelTime("linear 4x8x8 bf16 bias", 1, 1.0, 100, 10),
        KernelTime("copy", 1, 0.5),
    ]


def test_a_step_is_profiled_and_its_launches_noted(monkeypatch):
    """On a stand-in for the profiler, whose events come in no order, and for Triton's hook."""
    hooks = []
    hook = SimpleNamespace(add=hooks.append, remove=hooks.remove)
    monkeypatch.setattr(profile.triton.knobs.runtime, "launch_enter_hook", hook)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    class TimeRange:
        def __init__(self, start: int, seconds: float) -> None:
            self.start, self.elapsed_us = start, lambda: 1e6 * seconds

    class Profiler:
        def __init__(self, activities) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *exception) -> None: ...

        def events(self):
            found = [
                SimpleNamespace(name=name, device_type=gpu, time_range=TimeRange(i, seconds))
                for i, (name, seconds) in enumerate(KERNELS * profile.STEPS)
            ]
            return [SimpleNamespace(name="aten::mm", device_type=cpu), *reversed(found)]

    monkeypatch.setattr(torch.profiler, "profile", Profiler)

    def step() -> None:
        for each in METADATA:
            for call in hooks:
                call(SimpleNamespace(get=lambda each=each: each))

    found = profile.profiled(step)
    assert [(each.name, each.calls, each.seconds) for each in found] == [
        (name, pytest.approx(1), pytest.approx(seconds))
        for name, seconds in (
            ("stock_kernel", 4.0),
            ("linear 4x8x16 bf16 bias", 2.0),
            ("linear 4x8x8 bf16 bias", 1.0),
            ("copy", 0.5),
        )
    ]
    assert hooks == []
