import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from triton.runtime.errors import OutOfResources

from deit_fast.benchmark import operators
from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.operator_cases import operator_cases
from deit_fast.benchmark.operators import PEERS, measure_operators
from deit_fast.kernels.launching import run
from deit_fast.ops import backend

CPU = torch.device("cpu")
CASE = ModelCase("deit_tiny_distilled_patch16_224", 2, 32, training=True, drop_path=0.5)


class Clock:
    def calls(self, call) -> int:
        return 1

    def seconds(self, call, calls: int) -> float:
        call()
        return 1.0


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """timm's models with two blocks."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def test_every_operator_of_a_training_step_is_checked_and_timed():
    rows = list(measure_operators(CASE, CPU, Clock(), 2, lambda what: None))
    assert [row.failure for row in rows] == [None] * len(rows)
    assert all(row.seconds == [1.0, 1.0] and row.moved > 0 for row in rows)
    names = {row.operator for row in rows}
    assert {"layer_norm_linear", "attention", "attention_backward", "readout_attention_backward"} <= names
    # Drop path is off: it would leave parts of packed tensors unwritten.
    assert "keep_samples" not in names


def test_a_case_counts_how_often_a_step_calls_it():
    found = operator_cases(replace(CASE, training=False), CPU)
    assert {case.operator.name: case.times for case in found if case.operator.name == "attention"} == {"attention": 1}


def test_a_wrong_operator_is_not_timed(monkeypatch):
    def wrong(found, stock, expected) -> float:
        raise ArithmeticError("wrong: error 1")

    monkeypatch.setattr(operators, "_check", wrong)
    rows = list(measure_operators(replace(CASE, training=False), CPU, Clock(), 1, lambda what: None))
    assert {row.failure for row in rows} == {"ArithmeticError: wrong: error 1"}
    assert all(row.seconds == [] for row in rows)


def test_peers_are_named_where_they_are_not_installed_and_called_where_they_are(monkeypatch):
    """On a stand-in for flash-attn; the GPU's own list of contenders."""
    flash = ModuleType("flash_attn")
    flash.__spec__ = object()
    flash.flash_attn_qkvpacked_func = lambda qkv, softmax_scale: qkv[:, :, 0] * softmax_scale
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    case = next(
        each for each in operator_cases(replace(CASE, dtype="bfloat16"), CPU) if each.operator.name == "attention"
    )
    found = dict(operators._contenders(case, torch.device("cuda")))
    assert list(found) == ["stock", "deit_fast", "deit_fast, tuned", "flash-attn", "xformers"]
    assert found["xformers"] == "xformers is not installed"
    assert found["flash-attn"]().shape == case.operator.stock(*case.arguments)[0].shape


def test_where_memory_runs_out_the_other_operators_go_on(monkeypatch):
    """The stock call in float64 takes twice the memory."""
    double = operators._double
    full = iter([True])

    def doubled(arguments: tuple) -> tuple:
        if next(full, False):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return double(arguments)

    monkeypatch.setattr(operators, "_double", doubled)
    first, *others = measure_operators(replace(CASE, training=False), CPU, Clock(), 1, lambda what: None)
    assert (first.contender, first.failure) == ("stock in float64", "out of memory at batch 2")
    assert others and all(row.seconds == [1.0] for row in others)


def test_an_interrupted_operator_keeps_its_whole_rounds():
    class Stopped(Clock):
        timings = 0

        def seconds(self, call, calls: int) -> float:
            self.timings += 1
            if self.timings == 6:
                raise KeyboardInterrupt
            return 1.0

    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure_operators(replace(CASE, training=False), CPU, Stopped(), 9, lambda what: None):
            rows.append(row)
    assert [(row.contender, row.seconds) for row in rows] == [("stock", [1.0, 1.0]), ("deit_fast", [1.0, 1.0])]


def test_an_operator_whose_kernels_failed_says_so(monkeypatch):
    def refused(kernel, *args, **options) -> None:
        raise OutOfResources(300_000, 101_376, "shared memory")

    monkeypatch.setattr(backend, "failed", {})
    monkeypatch.setattr(run, "run", refused)
    with backend.forced("triton"), pytest.warns(UserWarning, match="its kernels failed"):
        rows = list(measure_operators(replace(CASE, training=False), CPU, Clock(), 1, lambda what: None))
    said = {(row.operator, row.contender): row.fallbacks for row in rows if row.operator == "attention"}
    assert said["attention", "stock"] == []
    (fallback,) = said["attention", "deit_fast"]
    assert fallback.startswith("deit_fast.attention: its kernels failed (OutOfResources: out of resource")
    assert fallback.endswith("; using the stock PyTorch operators")


@pytest.mark.parametrize("name", ["layer_norm", "attention"])
def test_peers_take_the_operators_arguments(name, monkeypatch):
    """On stand-ins for their packages: the names they are imported by, and what they are called with."""
    x, weight, qkv = torch.ones(2, 3, 8), torch.ones(8), torch.ones(2, 3, 3, 2, 4)
    for package, members in {
        "liger_kernel.ops.layer_norm": {
            "LigerLayerNormFunction": type("F", (), {"apply": staticmethod(lambda *a: a[0])})
        },
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": lambda x, w, b, shape, eps: x},
        "flash_attn": {"flash_attn_qkvpacked_func": lambda qkv, softmax_scale: qkv[:, :, 0]},
        "xformers.ops": {"memory_efficient_attention": lambda q, k, v, scale: q},
    }.items():
        parts = package.split(".")
        for i in range(len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), ModuleType(parts[i]))
        for member, value in members.items():
            setattr(sys.modules[package], member, value)
    arguments = (x, weight, weight, 1e-6) if name == "layer_norm" else ([qkv.bfloat16()], 0.5, None)
    for _, _, peer in PEERS[name]:
        assert peer(*arguments)().shape == (2, 3, 8)
