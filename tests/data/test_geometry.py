"""Sizes and resampling, against transformers' formulas."""

import random

import pytest
import torch

from deit_fast.data import geometry


def test_sizes_are_transformers_for_any_image():
    transforms = pytest.importorskip("transformers.image_transforms")
    utils = pytest.importorskip("transformers.image_utils")
    choose = random.Random(0)
    for _ in range(2000):
        height, width, edge, longest = (choose.randint(1, 700) for _ in range(4))
        height = choose.choice([height, width, edge])
        cases = {
            (("shortest_edge", edge), ("longest_edge", longest)): transforms.get_size_with_aspect_ratio(
                (height, width), edge, longest
            ),
            (("shortest_edge", edge),): transforms.get_resize_output_image_size(
                torch.empty(3, height, width), edge, False, input_data_format="channels_first"
            ),
            (("max_height", edge), ("max_width", longest)): utils.get_image_size_for_max_height_width(
                (height, width), edge, longest
            ),
        }
        for size, expected in cases.items():
            assert geometry.resized_size(dict(size), height, width) == expected, (size, height, width)


def test_lanczos_is_bicubic_where_torch_has_none_and_that_is_said():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8, device="meta")
    with pytest.warns(UserWarning, match="Lanczos on the CPU only"):
        assert geometry.resize(image, (4, 4), 1).shape == (3, 4, 4)


@pytest.mark.parametrize("resample", [0, 1, 2, 3, "nearest"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64])
def test_any_leading_dimensions_and_dtype_are_torchvisions(resample, dtype):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    transforms = pytest.importorskip("torchvision.transforms")
    modes = dict(enumerate(("nearest-exact", "lanczos", "bilinear", "bicubic"))) | {"nearest": "nearest"}
    images = (255 * torch.rand(2, 2, 3, 12, 9)).to(dtype)
    expected = functional.resize(images, [7, 20], transforms.InterpolationMode(modes[resample]))
    resized = geometry.resize(images, (7, 20), resample)
    assert resized.dtype == dtype
    torch.testing.assert_close(resized, expected, rtol=0, atol=1)
