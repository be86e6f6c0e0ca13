"""What is computed ahead of a training against what autograd keeps and what a bench has measured."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deit_fast
from deit_fast import ops
from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.measure import Row
from deit_fast.benchmark.results import Results
from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.models.registry import get_config
from deit_fast.ops import backend
from deit_fast.train.plan import days, fixed_memory, kept_for_backward, largest_batch, measured

DISTILLED, DEIT3 = "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"
SIZE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10}
DEIT_S = get_config("deit_small_distilled_patch16_224")


def counted(name: str, precision: str, memory: str, batch: int, drop_path: float = 0.0) -> int:
    """Bytes that a swapped model of timm keeps on the kernels."""
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, drop_path_rate=drop_path, **SIZE).train()
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    deit_fast.swap(model.to(dtype), memory=memory)
    images = torch.randn(batch, 3, 32, 32, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16) if precision == "amp" else nullcontext():
        return saved_bytes(model, lambda: model(images))


@pytest.mark.parametrize(
    ("name", "precision", "memory"),
    [
        (DISTILLED, "bf16", "balanced"),
        (DISTILLED, "amp", "low"),
        (DEIT3, "amp", "balanced"),
        (DEIT3, "float32", "low"),
        ("deit_tiny_patch16_224", "float32", "balanced"),
    ],
)
def test_what_is_kept_for_backward_is_what_autograd_keeps(name, precision, memory, triton_backend):
    config = replace(get_config(name), **SIZE)
    one, two = (counted(name, precision, memory, batch) for batch in (1, 2))
    assert kept_for_backward(config, precision, memory) == pytest.approx(two - one, rel=0.01)
    cast = fixed_memory(config, precision).get("matrices cast by autocast", 0)
    assert 2 * one - two == pytest.approx(cast, rel=0.01, abs=100)


def test_drop_path_changes_nothing_where_the_host_does_not_wait_for_its_draws(monkeypatch):
    monkeypatch.setattr(ops, "known_count", lambda kept: None)  # as on a GPU
    with backend.forced("torch"):
        one, two = (counted(DISTILLED, "float32", "balanced", batch, drop_path=0.9) for batch in (8, 16))
    config = replace(get_config(DISTILLED), **SIZE)
    assert 8 * kept_for_backward(config, "float32") == pytest.approx(two - one, rel=0.01)


@pytest.mark.parametrize(
    ("precision", "memory", "mebibytes"),
    [("bf16", "balanced", 16.5), ("bf16", "low", 10.1), ("amp", "balanced", 20.1), ("amp", "low", 13.7)],
)
def test_the_figures_of_the_documentation_come_out(precision, memory, mebibytes):
    assert round(kept_for_backward(DEIT_S, precision, memory) / 2**20, 1) == mebibytes


def test_memory_that_is_there_whatever_the_batch_follows_from_the_parameters():
    parameters = sum(p.numel() for p in deit_fast.create_model(DISTILLED, device="meta").parameters())
    found = fixed_memory(get_config(DISTILLED), "float32", "sgd")
    assert found == {"weights": 4 * parameters, "gradients": 4 * parameters, "sgd's state": 4 * parameters}
    found = fixed_memory(get_config(DISTILLED), "bf16", "lamb", ema=True, gpus=2)
    assert sum(found.values()) == 2 * parameters * (1 + 1 + 2 + 1 + 1)


@pytest.mark.parametrize(("name", "tensors"), [("adamw", 2), ("lamb", 2), ("sgd", 1)])
def test_the_optimizers_keep_as_many_tensors_as_is_said(name, tensors):
    create = pytest.importorskip("timm.optim").create_optimizer_v2
    model = torch.nn.Linear(64, 64, bias=False)
    optimizer = create(model, name, lr=1e-3)
    model(torch.randn(2, 64)).sum().backward()
    optimizer.step()
    kept = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t))
    assert kept == pytest.approx(tensors * model.weight.nbytes, rel=0.01)


def test_batches_and_days():
    assert largest_batch(1000, 300) == 3 and largest_batch(-1, 300) == 0
    assert days(300 * 86_400, 100.0) == 3.0


def test_a_bench_result_gives_the_step_of_this_model_at_this_batch_or_the_largest():
    case = ModelCase("deit_small_distilled_patch16_224", 8, 224, amp="bfloat16", training=True, drop_path=0.1)
    rows = [
        Row(case, "deit_fast", [2.0] * 3),
        Row(replace(case, batch=32), "deit_fast", [4.0] * 3),
        Row(replace(case, batch=64), "timm", [1.0] * 3),
        Row(replace(case, batch=128), "deit_fast", failure="out of memory"),
        Row(replace(case, training=False), "deit_fast", [0.1] * 3),
        Row(replace(case, model="resnet18"), "deit_fast", [0.1] * 3),
    ]
    results = Results({}, rows)
    assert measured(results, DEIT_S, "amp", 0.1, batch=8) == (4.0, 8)
    assert measured(results, DEIT_S, "amp", 0.1, batch=256) == (8.0, 32)
    assert measured(results, DEIT_S, "float32", 0.1, batch=8) is None
    assert measured(results, DEIT_S, "amp", 0.0, batch=8) is None
    assert measured(results, replace(DEIT_S, img_size=384), "amp", 0.1, batch=8) is None


def test_bytes_that_a_bench_has_counted_are_those_computed():
    results = Results.read(Path(__file__).parents[2] / "bench/results/cpu/results.json")
    case = ModelCase("deit_small_distilled_patch16_224", 16, 224, training=True)
    (row,) = (row for row in results.rows if row.case == case and row.contender == "deit_fast")
    assert row.saved_bytes == kept_for_backward(DEIT_S, "float32")
