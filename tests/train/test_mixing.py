"""What is drawn for a batch mixes images and labels to the bits of timm's Mixup."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from deit_fast import ops
from deit_fast.train.mixing import draw

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(
    "given",
    [
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "prob": 0.5, "switch_prob": 0.8},
        {"mixup_alpha": 0.2},
        {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "correct_lam": False},
        {"cutmix_minmax": (0.2, 0.8)},
    ],
    ids=str,
)
def test_images_and_targets_are_timms(mode, given):
    torch.manual_seed(0)
    mixup = Mixup(**given, mode=mode, num_classes=5)
    images, labels = torch.randint(256, (6, 3, 20, 14), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 0])
    for seed in range(6):
        np.random.seed(seed)
        expected = mixup(ops.normalise_pixels(images, MEAN, STD), labels)
        drawn = np.random.rand()
        np.random.seed(seed)
        targets, mix = draw(mixup, images.shape, labels)
        assert np.random.rand() == drawn
        mixed = ops.normalise_pixels(images, MEAN, STD, shares=mix.shares, boxes=mix.boxes)
        assert torch.equal(mixed, expected[0]) and torch.equal(targets, expected[1])


def test_a_whole_batch_is_mixed_in_one_way():
    np.random.seed(0)
    mixup, shape, labels = Mixup(0.8, 1.0, prob=0.7, num_classes=5), torch.Size((4, 3, 8, 8)), torch.zeros(4).long()
    ways = {tuple(each is not None for each in draw(mixup, shape, labels)[1]) for _ in range(40)}
    assert ways == {(True, False), (False, True), (False, False)}
