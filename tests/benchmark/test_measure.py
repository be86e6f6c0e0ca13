from dataclasses import replace

import pytest
import torch
from torch import nn

from deit_fast.benchmark.contenders import CONTENDERS, Case, Contender, recipe_drop_path
from deit_fast.benchmark.measure import measure

CPU = torch.device("cpu")
CASE = Case("deit_tiny_distilled_patch16_224", batch=3, img_size=32)


class Clock:
    """Calls once a timing; the n-th timing takes n seconds."""

    def __init__(self) -> None:
        self.timings = 0

    def calls(self, call) -> int:
        call()
        return 1

    def seconds(self, call, calls: int) -> float:
        call()
        self.timings += 1
        return float(self.timings)


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """timm's models with two blocks."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=2, **options))


def rows(case: Case, contenders: list[Contender], rounds: int = 2, clock=None) -> dict:
    return {row.contender: row for row in measure(case, contenders, CPU, clock or Clock(), rounds, lambda _: None)}


def named(*names: str) -> list[Contender]:
    return [CONTENDERS[name] for name in names]


@pytest.mark.parametrize("training", [False, True])
def test_stock_and_swapped_are_checked_counted_and_timed_in_turn(training):
    case = replace(CASE, training=training, drop_path=0.5 if training else 0.0)
    found = rows(case, named("timm", "timm, explicit attention", "deit_fast"), rounds=3)
    assert [row.failure for row in found.values()] == [None] * 3
    # Another one begins each round.
    assert [row.seconds for row in found.values()] == [[1.0, 6.0, 8.0], [2.0, 4.0, 9.0], [3.0, 5.0, 7.0]]
    timm, ours = found["timm"], found["deit_fast"]
    assert ours.flops < ours.stock_flops == timm.flops == timm.stock_flops
    assert ours.operator_calls < timm.operator_calls
    assert (ours.saved_bytes or 0) <= (timm.saved_bytes or 0)
    assert (timm.saved_bytes is not None) is training
    assert 0 < ours.error < 1e-5


@pytest.mark.parametrize("training", [False, True])
def test_transformers_models_are_checked_against_themselves(training):
    found = rows(replace(CASE, training=training), named("transformers, eager", "transformers, sdpa"), rounds=1)
    assert [row.failure for row in found.values()] == [None] * 2


@pytest.mark.parametrize("precision", [{"dtype": "bfloat16"}, {"amp": "bfloat16"}])
def test_16_bit_models_are_checked_by_their_own_rounding(precision):
    found = rows(replace(CASE, **precision), named("timm", "deit_fast"), rounds=1)
    assert [row.failure for row in found.values()] == [None] * 2
    assert found["deit_fast"].error > 1e-4


def test_a_contender_that_computes_something_else_is_not_timed():
    def wrong(case: Case) -> nn.Module:
        model = CONTENDERS["timm"].build(case)
        model.norm.eps = 0.1
        return model

    found = rows(CASE, [*named("timm"), Contender("wrong", ("timm",), wrong, stock="timm")])
    assert found["wrong"].failure.startswith("ArithmeticError: wrong: error")
    assert found["wrong"].seconds == []
    assert len(found["timm"].seconds) == 2


def test_a_peer_that_is_not_installed_is_named():
    found = rows(CASE, [Contender("other", ("no_such_package",), CONTENDERS["timm"].build)])
    assert found["other"].failure == "no_such_package is not installed"


def test_what_needs_a_gpu_is_not_run_without():
    assert CONTENDERS["deit_fast, CUDA graphs"].missing(CPU) == "it needs a GPU"
    assert CONTENDERS["deit_fast, CUDA graphs"].missing(torch.device("cuda")) is None


def test_where_memory_runs_out_the_others_go_on():
    class Full(Clock):
        def seconds(self, call, calls: int) -> float:
            if self.timings == 1:
                self.timings += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return super().seconds(call, calls)

    found = rows(CASE, named("timm", "timm, explicit attention"), rounds=3, clock=Full())
    assert found["timm, explicit attention"].failure == "out of memory at batch 3"
    assert found["timm, explicit attention"].seconds == []
    assert len(found["timm"].seconds) == 3


def test_the_recipes_have_their_drop_path():
    assert recipe_drop_path("deit_small_distilled_patch16_224") == 0.1
    assert recipe_drop_path("deit3_large_patch16_224") == 0.45
    assert recipe_drop_path("vit_small_patch16_224") == 0.0


def test_deit_iii_has_one_rate_in_every_block_and_deit_a_rising_one():
    def rates(model: str) -> list[float]:
        built = CONTENDERS["timm"].build(Case(model, 1, 32, training=True, drop_path=0.2))
        return [getattr(block.drop_path2, "drop_prob", 0.0) for block in built.blocks]

    assert rates("deit_tiny_patch16_224") == [0.0, pytest.approx(0.2)]
    assert rates("deit3_small_patch16_224") == [0.2, 0.2]
