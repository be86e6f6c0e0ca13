"""DeiTImageProcessor and DeiTFeatureExtractor."""

import json
import warnings

import numpy as np
import pytest
import torch

import deit_fast

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")

import deit_fast.transformers  # noqa: E402
from deit_fast.transformers import DeiTFeatureExtractor, DeiTImageProcessor  # noqa: E402

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(count: int = 2) -> list:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (60 + i, 90, 3), dtype=np.uint8)) for i in range(count)]


@pytest.mark.parametrize("options", [{}, {"image_mean": MEAN, "image_std": STD, "size": 70, "crop_size": 64}])
def test_pixels_are_those_of_transformers_and_of_our_own_processor(options: dict) -> None:
    result = DeiTImageProcessor(**options)(photographs(), return_tensors="pt").pixel_values
    for other in (transformers.DeiTImageProcessor, deit_fast.DeiTImageProcessor):
        torch.testing.assert_close(
            result, other(**options)(photographs(), return_tensors="pt").pixel_values, rtol=0, atol=1e-6
        )


def test_it_is_transformers_class_and_takes_its_arguments() -> None:
    assert issubclass(DeiTImageProcessor, transformers.DeiTImageProcessor)
    stock = transformers.DeiTImageProcessor
    assert DeiTImageProcessor.valid_kwargs is stock.valid_kwargs
    assert DeiTImageProcessor().to_dict() == stock().to_dict()


def test_the_other_names_of_the_documentation_are_known() -> None:
    assert deit_fast.transformers.DeiTImageProcessorFast is DeiTImageProcessor
    assert deit_fast.transformers.DeiTImageProcessorPil is transformers.DeiTImageProcessorPil


@pytest.mark.filterwarnings("ignore:DeiTFeatureExtractor:FutureWarning")
@pytest.mark.parametrize("ours", [DeiTImageProcessor, DeiTFeatureExtractor])
def test_folders_go_both_ways(ours: type, tmp_path) -> None:
    ours(image_mean=MEAN, size=70).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == (
        "DeiTImageProcessor"
    )
    for load in (transformers.AutoImageProcessor, transformers.DeiTImageProcessor, ours):
        loaded = load.from_pretrained(tmp_path)
        assert tuple(loaded.image_mean) == MEAN and loaded.size["height"] == 70
        assert isinstance(loaded, transformers.DeiTImageProcessor)
    assert type(loaded) is ours


def test_the_older_name_is_the_processor_and_says_so_once() -> None:
    with pytest.warns(FutureWarning, match="use that") as notes:
        older = DeiTFeatureExtractor(size=70, crop_size=64)
    assert len(notes) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = DeiTImageProcessor(size=70, crop_size=64)
        expected = processor(images=photographs(), return_tensors="pt").pixel_values
        assert torch.equal(older(images=photographs(), return_tensors="pt").pixel_values, expected)
        assert torch.equal(older.preprocess(photographs(), return_tensors="pt").pixel_values, expected)
