"""Evaluation: means over the images, whatever batches they come in."""

import pytest
import torch
from torch import nn

from deit_fast.train.evaluation import evaluate
from deit_fast.train.reading import Batches

accelerate = pytest.importorskip("accelerate")

IMAGES, LABELS = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])


def batches(size: int) -> Batches:
    made = [(images, labels, {}) for images, labels in zip(IMAGES.split(size), LABELS.split(size), strict=True)]
    return Batches(made, len(IMAGES), 0.0, rounds=len(made))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_smaller_batch_counts_for_its_images(size):
    found = evaluate(nn.Identity(), batches(size), nn.Identity(), accelerate.Accelerator(cpu=True))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(IMAGES, LABELS).item(), rel=1e-6)
    assert found.accuracy == (IMAGES.argmax(-1) == LABELS).double().mean()


def test_a_process_with_fewer_batches_asks_as_often_whether_to_stop():
    asked, few = [], batches(3)
    few.rounds = 4
    accelerator = accelerate.Accelerator(cpu=True)
    found = evaluate(nn.Identity(), few, nn.Identity(), accelerator, lambda: asked.append(None))
    assert found.accuracy >= 0 and len(asked) == 4


def test_one_that_is_told_to_stop_has_no_result():
    told = iter([False, True])
    accelerator = accelerate.Accelerator(cpu=True)
    assert evaluate(nn.Identity(), batches(2), nn.Identity(), accelerator, lambda: next(told)) is None
