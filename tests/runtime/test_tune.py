"""`deit_fast.tune`, on a stand-in for a GPU and by a clock that decides what is fast (tune_checks.py)."""

import pytest
import timm
import torch
from torch import nn

import deit_fast
from tests.support.compiled import printed_by

PARTS = ["patch_embed", "blocks.0", "blocks.1", "norm"]
BLOCKS = ["blocks.0", "blocks.1"]


@pytest.fixture(scope="module")
def found():
    return printed_by("tests/runtime/tune_checks.py")


@pytest.mark.parametrize("case", ["swapped is faster", "again", "training"])
def test_what_is_faster_stays_swapped(found, case):
    assert (found[case]["swapped"], found[case]["kept"]) == (PARTS, {})
    assert found[case]["swapped blocks"] == BLOCKS


def test_what_was_measured_is_read_again_and_training_is_another_thing(found):
    assert found["swapped is faster"]["timed"] > 0 and found["training"]["timed"] > 0
    assert found["again"]["timed"] == 0


def test_a_block_that_stock_computes_faster_is_stock_again_and_the_report_says_so(found):
    now, again = found["stock blocks are faster"], found["again, stock blocks"]
    assert now["swapped blocks"] == again["swapped blocks"] == []
    assert now["swapped"] == again["swapped"] == ["patch_embed", "norm"]
    assert set(now["kept"]) == set(again["kept"]) == set(BLOCKS)
    assert all(
        reason.startswith("stock is faster on sm_90 at batch 2: 500000 µs against") for reason in now["kept"].values()
    )
    assert set(again["kept"].values()) == {"stock was faster on sm_90 at batch 2"}


def test_a_model_that_is_slower_as_a_whole_is_all_stock_again(found):
    outcome = found["only the whole is slower"]
    assert outcome["swapped"] == [] and outcome["swapped blocks"] == []
    assert set(outcome["kept"]) == set(PARTS)
    assert all(reason.startswith("in the whole model stock is faster") for reason in outcome["kept"].values())


def test_nothing_is_measured_when_time_is_up_and_all_stays_swapped(found):
    assert (found["no time"]["timed"], found["no time"]["swapped"]) == (0, PARTS)


def test_modes_gradients_and_random_numbers_are_as_before(found):
    assert found["as before"] == {"modes": True, "random numbers": True, "gradients": True}


def test_bad_input_is_named_before_anything_is_measured():
    images = torch.zeros(1, 3, 32, 32)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got int"):
        deit_fast.tune(3, images)
    with pytest.raises(ValueError, match=r"nothing swapped in this model; call deit_fast\.swap"):
        deit_fast.tune(nn.Linear(2, 2), images)
    deit_fast.swap(model)
    with pytest.raises(ValueError, match="measures a GPU, and the images are on cpu: move model and images"):
        deit_fast.tune(model, images)
