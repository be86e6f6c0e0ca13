import json

import numpy as np
import PIL.Image
import pytest
import torch

import deit_fast
from deit_fast.data.evaluation import image_processor


def test_another_image_size_keeps_the_saved_statistics(tmp_path):
    deit_fast.DeiTImageProcessor(image_mean=0.25, crop_size=224).save_pretrained(tmp_path)
    assert image_processor(str(tmp_path), 224).size == {"height": 256, "width": 256}
    larger = image_processor(str(tmp_path), 384)
    assert larger.image_mean == 0.25 and larger.crop_size == {"height": 384, "width": 384}
    assert larger.size == {"shortest_edge": 438}


def test_images_that_are_no_squares_are_resized_to_256_of_224(tmp_path):
    processor = image_processor(None, (224, 448))
    assert processor.size == {"height": 256, "width": 512} and processor.crop_size == {"height": 224, "width": 448}
    processor.save_pretrained(tmp_path)
    assert image_processor(str(tmp_path), (224, 448)).to_dict() == processor.to_dict()
    assert image_processor(str(tmp_path), 224).crop_size == {"height": 224, "width": 224}


def test_settings_in_a_combined_file_are_found(tmp_path):
    saved = deit_fast.DeiTImageProcessor(image_mean=0.25, crop_size=224)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": saved.to_dict()}))
    assert image_processor(str(tmp_path), 224).image_mean == 0.25


def test_a_timm_folder_s_images_are_prepared_as_timm_does(tmp_path):
    timm = pytest.importorskip("timm")
    data_config = {
        "input_size": (3, 32, 32), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear",
        "crop_pct": 0.8,
    }  # fmt: skip
    timm.models.save_for_hf(timm.create_model("test_vit"), str(tmp_path), data_config=data_config)
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    expected = timm.data.create_transform(**data_config)(PIL.Image.fromarray(pixels))
    found = image_processor(str(tmp_path), 32)(pixels, return_tensors="pt").pixel_values[0]
    # Resized values are rounded to 1 of 255 by another library.
    torch.testing.assert_close(found, expected, atol=1.01 / 255 / 0.2, rtol=0)
