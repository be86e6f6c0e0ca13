"""Paired timing: the same work on both sides, and as many rounds as fit."""

import pytest

import deit_fast
from evidence import cpu_time
from evidence.cpu_time import PairedCase, Round, line, measure
from evidence.recipes import Recipe

TINY = Recipe("DeiT-Ti", "deit_tiny_patch16_224", 0.5, everywhere=True)


@pytest.mark.parametrize("training", [True, False])
def test_both_sides_of_a_round_compute_the_same(training):
    shown = []
    done = measure(PairedCase(TINY, 2, training), rounds=2, budget=60, progress=shown.append)
    assert len(done) == len(shown) == 2
    assert all(each.difference < 1e-4 for each in done)


def test_every_other_round_runs_the_swapped_model_first(monkeypatch):
    classes = []
    timed_step = cpu_time._timed_step

    def recorded(model, *rest):
        classes.append("swapped" if deit_fast.report(model).calls else "stock")
        return timed_step(model, *rest)

    monkeypatch.setattr(cpu_time, "_timed_step", recorded)
    measure(PairedCase(TINY, 1, training=False), rounds=3, budget=60, progress=lambda text: None)
    warm_up, rounds = classes[:2], classes[2:]
    assert warm_up == ["stock", "swapped"]
    assert rounds == ["stock", "swapped", "swapped", "stock", "stock", "swapped"]


def test_a_spent_budget_ends_the_row_after_its_first_round():
    done = measure(PairedCase(TINY, 1, training=False), rounds=9, budget=0, progress=lambda text: None)
    assert len(done) == 1


def test_the_ratio_is_the_median_of_the_rounds_and_few_rounds_are_marked():
    rounds = [Round(2.0, 1.0, 0.0), Round(9.0, 3.0, 1e-7), Round(4.0, 4.0, 0.0)]
    found = line(PairedCase(TINY, 2), rounds)
    assert "| 3 (fewer than 9) | 4.000 | 3.000 | 2.000 | 1.000 to 3.000 | 1.0e-07 |" in found
    assert "| 9 |" in line(PairedCase(TINY, 2), rounds * 3)
