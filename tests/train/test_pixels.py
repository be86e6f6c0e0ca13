"""Images travel as bytes, and are erased where they are normalised, as timm's RandomErasing does it."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional

from deit_fast.train.pixels import ByteImages, Normalise, ToBytes, batched

CONFIG = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CPU = torch.device("cpu")


def drawing(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 5])
def test_what_is_erased_has_timms_draws_and_bits(mode, count):
    erasing = RandomErasing(0.7, mode=mode, max_count=count, max_area=0.9, device="cpu")
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 18, 3), dtype=np.uint8)) for i in range(9)]
    expected, drawn = [], []
    for seed, image in enumerate(images):
        drawing(seed)
        expected.append(erasing(functional.normalize(functional.to_tensor(image), **CONFIG)))
        drawn.append((random.random(), torch.rand(())))
    samples = []
    for seed, image in enumerate(images):
        drawing(seed)
        samples.append(ToBytes(erasing)(image))
        assert (random.random(), torch.rand(())) == drawn[seed]
    byte_images = batched(samples)
    assert byte_images.images.dtype is torch.uint8 and byte_images.erased.shape == (9, count, 5)
    assert torch.equal(Normalise(CONFIG, CPU)(byte_images), torch.stack(expected))


def test_batches_have_few_lengths_of_noise():
    """Launches are remembered by shapes."""
    erasing = RandomErasing(0.5, mode="pixel", device="cpu")
    image = Image.new("RGB", (32, 32))
    lengths = {len(batched([ToBytes(erasing)(image) for _ in range(16)]).noise) for _ in range(20)}
    assert len(lengths) < 6 and all(length & (length - 1) == 0 for length in lengths)
    never = RandomErasing(0.0, mode="pixel", device="cpu")
    assert len(batched([ToBytes(never)(image)]).noise) == 1


def test_nothing_travels_beside_images_that_are_never_erased():
    byte_images = batched([ToBytes()(Image.new("RGB", (6, 4), (255, 0, 51)))] * 2)
    assert (
        byte_images[1:] == (None, None)
        and byte_images.images.is_contiguous()
        and byte_images.images.shape == (2, 3, 4, 6)
    )
    found = Normalise(CONFIG, CPU, torch.bfloat16)(byte_images)
    exact = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CONFIG["mean"])) / torch.tensor(CONFIG["std"])
    assert torch.equal(found[1, :, 3, 5], exact.bfloat16())


def test_images_of_other_than_bytes_are_refused():
    with pytest.raises(ValueError, match="images must be uint8"):
        Normalise(CONFIG, CPU)(ByteImages(torch.zeros(2, 3, 4, 4)))
