"""Pixels of bytes: kernels, stock form and reference agree; the stock form has torchvision's and timm's bits."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torchvision.transforms import functional

from deit_fast import ops
from deit_fast.ops import backend
from tests.support.compare import BATCHES, DTYPES, assert_op_is_right, strided

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def images_of(batch: int = 4, height: int = 20, width: int = 28) -> torch.Tensor:
    return torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)


def shares_of(batch: int = 4) -> torch.Tensor:
    lam = torch.rand(batch)
    return torch.stack((lam, 1 - lam), 1)


def erasing(rectangles: list[list[tuple[int, int, int, int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each image's rectangles (top, left, height, width) what the operator takes, and numbers to fill them with."""
    first, erased = 0, []
    for rows in rectangles:
        erased.append([])
        for rectangle in rows:
            erased[-1].append((*rectangle, first))
            first += 3 * rectangle[2] * rectangle[3]
    return torch.tensor(erased, dtype=torch.int32), torch.randn(first + 7)


ERASED = [
    [(0, 0, 3, 4), (10, 9, 10, 19)],
    [(0, 0, 0, 0), (5, 0, 1, 28)],
    [(0, 0, 20, 28), (0, 0, 0, 5)],
    [(0,) * 4] * 2,
]
BOXES = torch.tensor([[3, 4, 5, 6], [0, 0, 20, 28], [0, 0, 0, 0], [19, 27, 1, 1]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("boxes", [None, BOXES], ids=["uncut", "cut"])
@pytest.mark.parametrize("mixed", [False, True], ids=["unmixed", "mixed"])
@pytest.mark.parametrize("erased", [None, ERASED], ids=["whole", "erased"])
def test_pixels_are_erased_then_mixed_then_rounded_once(erased, mixed, boxes, dtype):
    given = erasing(erased) if erased else (None, None)
    arguments = images_of(), MEAN, STD, dtype, *given, shares_of() if mixed else None, boxes
    (ours,) = assert_op_is_right("normalise_pixels", *arguments)
    with backend.forced("torch"):
        assert ours.dtype is dtype and torch.equal(ours, ops.normalise_pixels(*arguments))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 64), (40, 100)])
def test_any_batch_and_size_and_stride(batch, size):
    """Of several pieces a channel, too."""
    images = images_of(batch, *size)
    rectangle = torch.tensor([0, 0, 1, 1, 2], dtype=torch.int32).repeat(batch, 1, 1)
    given = (
        rectangle,
        torch.randn(5),
        shares_of(batch),
        torch.tensor([[0, 0, 1, 1]], dtype=torch.int32).repeat(batch, 1),
    )
    assert_op_is_right("normalise_pixels", images, MEAN, STD, torch.float32, *given)
    assert_op_is_right("normalise_pixels", strided(images), strided(MEAN), STD, torch.float32, *map(strided, given))


@pytest.mark.parametrize("name", [None, "triton"], ids=["cpu", "kernels"])
def test_the_bits_are_those_of_torchvision(name):
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    with backend.forced(name):
        pixels = ops.normalise_pixels(every, MEAN, STD)
    array = every[0].permute(1, 2, 0).numpy()
    assert torch.equal(pixels[0], functional.normalize(functional.to_tensor(array), MEAN, STD))


@pytest.mark.parametrize("name", [None, "triton"], ids=["cpu", "kernels"])
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_the_bits_are_those_of_timms_mixup(name, kind):
    images = images_of()
    timms = Mixup(**{"mixup_alpha": 0.0, "cutmix_alpha": 0.0, f"{kind}_alpha": 1.0})
    pixels = ops.normalise_pixels(images, MEAN, STD)
    np.random.seed(3)
    expected, _ = timms(pixels, torch.zeros(4, dtype=torch.long))
    np.random.seed(3)
    lam = np.random.rand() and np.random.beta(1.0, 1.0)
    shares = torch.tensor([[lam, 1 - lam]]).repeat(4, 1) if kind == "mixup" else None
    boxes = None
    if kind == "cutmix":
        changed = (expected != ops.normalise_pixels(images, MEAN, STD)).any(1).any(0).nonzero()
        (top, left), (bottom, right) = changed.min(0).values.tolist(), (changed.max(0).values + 1).tolist()
        boxes = torch.tensor([[top, left, bottom - top, right - left]], dtype=torch.int32).repeat(4, 1)
    with backend.forced(name):
        assert torch.equal(ops.normalise_pixels(images, MEAN, STD, shares=shares, boxes=boxes), expected)


def test_a_rectangle_is_found_without_reading_where_it_is():
    """As a GPU does it that has no kernel: on a CPU it is read."""
    erased, noise = erasing(ERASED)
    arguments = images_of(), MEAN, STD, torch.float32, erased, noise
    compiled = torch.compile(ops.normalise_pixels, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), ops.normalise_pixels(*arguments))


def test_what_does_not_fit_together_is_refused():
    images, (erased, noise) = images_of(), erasing(ERASED)
    for wrong, error, message in (
        ({"images": images.float()}, ValueError, "images must be uint8"),
        ({"mean": MEAN[:1]}, ValueError, r"mean must have shape \(3,\)"),
        ({"std": STD.half()}, TypeError, "std must be float32"),
        ({"dtype": torch.int32}, TypeError, "dtype must be floating-point"),
        ({"erased": erased}, ValueError, "erased and noise go together"),
        ({"erased": erased, "noise": noise[:0]}, ValueError, "noise must be .* one number or more"),
        ({"erased": erased.long(), "noise": noise}, ValueError, r"erased must be int32 of shape \(4, rectangles, 5\)"),
        ({"shares": shares_of(3)}, ValueError, r"shares must be .* \(4, 2\)"),
        ({"boxes": BOXES[:, :3]}, ValueError, r"boxes must be int32 of shape \(4, 4\)"),
    ):
        with pytest.raises(error, match=message):
            ops.normalise_pixels(**({"images": images, "mean": MEAN, "std": STD} | wrong))
