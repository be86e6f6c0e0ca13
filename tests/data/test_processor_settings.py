"""Settings and their files, against transformers' own."""

import json

import pytest
import torch

from deit_fast.data import DeiTImageProcessor
from deit_fast.data.processor_settings import SETTINGS

transformers = pytest.importorskip("transformers")

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def test_every_setting_of_transformers_is_one():
    assert SETTINGS.keys() >= transformers.DeiTImageProcessor.valid_kwargs.__annotations__.keys()


def test_transformers_reads_ours_and_we_read_theirs(tmp_path):
    settings = {"size": {"shortest_edge": 438}, "crop_size": 384, "do_convert_rgb": True, **IMAGENET}
    DeiTImageProcessor(**settings).save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__.startswith("DeiTImageProcessor")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        read = DeiTImageProcessor.from_pretrained(tmp_path / name)
        assert read.to_dict() == DeiTImageProcessor(**settings).to_dict()
    assert DeiTImageProcessor.from_pretrained(tmp_path / "ours", crop_size=8).crop_size["height"] == 8


def test_the_published_configuration_is_read(tmp_path):
    # What the DeiT checkpoints on the hub carry: an older class name, sizes as plain ints.
    published = {
        "feature_extractor_type": "DeiTFeatureExtractor",
        "do_resize": True,
        "size": 256,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 224,
        "do_normalize": True,
        **IMAGENET,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert DeiTImageProcessor.from_pretrained(tmp_path).to_dict() == DeiTImageProcessor(**IMAGENET).to_dict()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"image_processor_type": "ViTImageProcessor"}', "ViTImageProcessor"),
        ('{"size": "big"}', "size"),
        ("[1, 2]", "preprocessor_config.json"),
        ("{", "preprocessor_config.json"),
    ],
)
def test_a_wrong_configuration_file_is_named(tmp_path, text, message):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        DeiTImageProcessor.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        DeiTImageProcessor.from_pretrained(tmp_path / "elsewhere")


SIZES = [
    {"size": {"shortest_edge": 30, "longest_edge": 40}, "crop_size": 20},
    {"size": {"max_height": 30, "max_width": 40}, "crop_size": 20},
    {"size": {"longest_edge": 40}, "do_resize": False},
    {"size": None, "do_resize": None},
    {"do_rescale": None, "input_data_format": "channels_first", "return_tensors": "pt"},
]


@pytest.mark.parametrize("settings", SIZES, ids=str)
@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_files_of_any_settings_give_the_same_pixels(tmp_path, settings, writer):
    written = (DeiTImageProcessor if writer == "ours" else transformers.DeiTImageProcessor)(**settings)
    written.save_pretrained(tmp_path)
    images = torch.randint(256, (1, 3, 60, 50), dtype=torch.uint8)
    ours, theirs = (
        kind.from_pretrained(tmp_path)(images).pixel_values
        for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor)
    )
    torch.testing.assert_close(
        list(ours), list(theirs), rtol=0, atol=1.001 * (2 if "do_rescale" in settings else 2 / 255)
    )


def test_settings_within_a_combined_file_come_first_as_in_transformers(tmp_path):
    DeiTImageProcessor(crop_size=8).save_pretrained(tmp_path)
    combined = tmp_path / "processor_config.json"
    combined.write_text(json.dumps({"processor_class": "DeiTProcessor"}))
    for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor):
        assert kind.from_pretrained(tmp_path).crop_size["height"] == 8
    combined.write_text(json.dumps({"image_processor": DeiTImageProcessor(crop_size=16).to_dict()}))
    for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor):
        assert kind.from_pretrained(tmp_path).crop_size["height"] == 16
    (tmp_path / "preprocessor_config.json").unlink()
    assert DeiTImageProcessor.from_pretrained(tmp_path).crop_size["height"] == 16
    combined.write_text("{")
    with pytest.raises(ValueError, match=r"processor_config\.json: "):
        DeiTImageProcessor.from_pretrained(tmp_path)


def test_json_is_written_and_read_as_transformers_does(tmp_path):
    settings = {"size": {"shortest_edge": 30, "longest_edge": 40}, "do_resize": None, "image_mean": 0.25}
    ours, theirs = DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings)
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string()) | {"default_to_square": True}
    assert ours.save_pretrained(tmp_path) == theirs.save_pretrained(tmp_path)
    for number, written in enumerate((ours, theirs)):
        written.to_json_file(tmp_path / f"{number}.json")
        assert DeiTImageProcessor.from_json_file(tmp_path / f"{number}.json").to_dict() == ours.to_dict()
    with pytest.raises(FileNotFoundError, match="absent"):
        DeiTImageProcessor.from_json_file(tmp_path / "absent.json")


def test_enumerations_are_written_as_plain_values():
    utils = pytest.importorskip("transformers.image_utils")
    transforms = pytest.importorskip("torchvision.transforms")
    processor = DeiTImageProcessor(
        resample=transforms.InterpolationMode.BILINEAR,
        input_data_format=utils.ChannelDimension.FIRST,
        device=torch.device("cpu"),
    )
    written = json.loads(processor.to_json_string())
    assert (written["resample"], written["input_data_format"], written["device"]) == (2, "channels_first", "cpu")
