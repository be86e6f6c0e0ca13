"""Evaluation: means over the images, whatever batches they come in."""

import pytest
import torch
from torch import nn

from deit_fast.train.evaluation import evaluate

accelerate = pytest.importorskip("accelerate")

IMAGES, LABELS = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])


def batches(size: int):
    return list(zip(IMAGES.split(size), LABELS.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_smaller_batch_counts_for_its_images(size):
    found = evaluate(nn.Identity(), batches(size), accelerate.Accelerator(cpu=True))
    assert found.loss == pytest.approx(nn.functional.cross_entropy(IMAGES, LABELS).item(), rel=1e-6)
    assert found.accuracy == (IMAGES.argmax(-1) == LABELS).double().mean()


def test_one_that_is_told_to_stop_has_no_result():
    told = iter([False, True])
    assert evaluate(nn.Identity(), batches(2), accelerate.Accelerator(cpu=True), lambda: next(told)) is None
