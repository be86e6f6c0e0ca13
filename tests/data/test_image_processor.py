"""The processor against transformers' own, on real photographs and on what is hard for it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.data import DeiTImageProcessor

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")

# One level of an 8-bit image: the rounding of the resize is the only freedom two implementations have.
LEVEL = 1 / 255
# Of the float32 numbers a level apart.
ROUNDING = 1e-6
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    return [image.copy() for image in datasets.load_sample_images().images]  # two, [427, 640, 3] uint8


def assert_same(ours: DeiTImageProcessor, theirs, images, std: float = 1.0, level: float = LEVEL, **kwargs):
    expected = theirs(images, return_tensors="pt", **kwargs).pixel_values
    actual = ours(images, return_tensors="pt", **kwargs).pixel_values
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=(level + ROUNDING) / std)
    return actual


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["pil", "hwc", "chw", "torch_hwc", "torch_chw", "batch"])
def test_photographs_match_transformers(photographs, kind, normalize):
    convert = {
        "pil": Image.fromarray,
        "hwc": lambda a: a,
        "chw": lambda a: a.transpose(2, 0, 1),
        "torch_hwc": torch.from_numpy,
        "torch_chw": lambda a: torch.from_numpy(a).permute(2, 0, 1),
        "batch": lambda a: a,
    }[kind]
    images = [convert(a) for a in photographs]
    images = np.stack(images) if kind == "batch" else images
    settings = {"do_normalize": normalize, **IMAGENET}
    ours, theirs = DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings)
    pixels = assert_same(ours, theirs, images, std=0.224 if normalize else 1.0)
    assert pixels.shape == (2, 3, 224, 224) and pixels.dtype == torch.float32


def test_photographs_match_the_pil_backend_too(photographs):
    theirs = transformers.DeiTImageProcessorPil(do_normalize=False)
    images = [Image.fromarray(a) for a in photographs]
    expected = torch.tensor(np.stack(theirs(images).pixel_values))
    actual = DeiTImageProcessor(do_normalize=False)(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(actual, expected, rtol=0, atol=LEVEL + ROUNDING)


def test_defaults_are_those_of_transformers():
    assert DeiTImageProcessor().to_dict() == transformers.DeiTImageProcessor().to_dict() | {"default_to_square": True}


@pytest.mark.parametrize(
    "settings",
    [
        {"do_resize": False},
        {"do_center_crop": False},
        {"do_rescale": False},
        {"do_rescale": False, "do_normalize": False},  # stays uint8
        {"do_rescale": True, "do_normalize": False, "rescale_factor": 1 / 128},
        {"size": {"shortest_edge": 256}},
        {"size": 200, "default_to_square": False},
        {"size": (301, 277), "crop_size": 384},  # odd and even differences, padded
        {"size": (300, 100), "crop_size": (224, 225)},  # padded one way, cropped the other
        {"resample": 0},
        {"resample": 1},
        {"resample": 2},
        {"image_mean": 0.5, "image_std": 0.25},
        {"do_pad": True, "pad_size": 256},
    ],
    ids=str,
)
def test_settings_match_transformers(photographs, settings):
    # The width is made odd, so that half pixels in the crop show.
    photograph = photographs[1][:, :-1]
    assert_same(
        DeiTImageProcessor(**settings),
        transformers.DeiTImageProcessor(**settings),
        photograph,
        std=0.25,
        level=1.0 if settings.get("do_rescale") is False else LEVEL,
    )


@pytest.mark.parametrize("height, width", [(1, 1), (3, 500), (223, 225), (224, 224), (225, 223), (257, 511)])
def test_crop_offsets_and_padding_match_transformers_exactly(height, width):
    image = torch.arange(height * width * 3).reshape(3, height, width).to(torch.uint8)
    settings = {"do_resize": False, "input_data_format": "channels_first"}
    ours = DeiTImageProcessor()(image, return_tensors="pt", **settings).pixel_values
    theirs = transformers.DeiTImageProcessor()(image, return_tensors="pt", **settings).pixel_values
    assert torch.equal(ours, theirs)


def test_floating_point_images_match_transformers(photographs):
    image = photographs[0].astype(np.float32) / 255
    ours, theirs = DeiTImageProcessor(do_rescale=False), transformers.DeiTImageProcessor(do_rescale=False)
    assert_same(ours, theirs, image, level=1e-5)
    assert_same(ours, theirs, torch.from_numpy(image).permute(2, 0, 1), level=1e-5)
    half = ours(image.astype(np.float16), return_tensors="pt").pixel_values
    assert half.dtype == torch.float32


def test_images_rescaled_twice_draw_a_warning(photographs):
    with pytest.warns(UserWarning, match="do_rescale=False"):
        DeiTImageProcessor()(photographs[0].astype(np.float32) / 255)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK"])
def test_pil_modes_convert_to_rgb_as_in_transformers(photographs, mode):
    image = Image.fromarray(photographs[0]).convert(mode)
    if "A" in mode:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    settings = {"do_convert_rgb": True, "do_normalize": False}
    assert_same(DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings), image)


@pytest.mark.parametrize("channels", [1, 4])
def test_arrays_convert_to_rgb_as_in_transformers(photographs, channels):
    image = np.concatenate([photographs[0], photographs[1][:, :, :1]], axis=2)[:, :, -channels:]
    settings = {"do_convert_rgb": True, "do_normalize": False}
    ours, theirs = DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings)
    # Theirs cuts the blended value down where we round it: one level before the resize, up to two after it.
    assert_same(ours, theirs, image, level=2.01 * LEVEL)


def test_grey_images_with_one_mean(photographs):
    image = Image.fromarray(photographs[0]).convert("L")
    pixels = DeiTImageProcessor(image_mean=[0.5], image_std=[0.5])(image, return_tensors="pt").pixel_values
    assert pixels.shape == (1, 1, 224, 224)


def test_ambiguous_axes_mean_channels_first_unless_told():
    image = torch.randint(256, (3, 30, 3), dtype=torch.uint8)
    processor = DeiTImageProcessor(do_resize=False, do_center_crop=False)
    assert processor(image).pixel_values[0].shape == (3, 30, 3)
    assert processor(image, input_data_format="channels_last").pixel_values[0].shape == (3, 3, 30)


def test_readonly_and_reversed_arrays(photographs):
    image = photographs[0][:, ::-1]
    image.setflags(write=False)
    assert_same(DeiTImageProcessor(), transformers.DeiTImageProcessor(), image.copy())
    DeiTImageProcessor()(image)


def test_inputs_are_left_as_they_were(photographs):
    image = torch.from_numpy(photographs[0].copy()).float()
    before = image.clone()
    DeiTImageProcessor(do_resize=False)(image)
    assert torch.equal(image, before)


def test_return_tensors(photographs):
    processor = DeiTImageProcessor()
    tensors = processor(photographs).pixel_values
    assert [t.shape for t in tensors] == [(3, 224, 224)] * 2
    array = processor(photographs, return_tensors="np").pixel_values
    assert isinstance(array, np.ndarray) and array.dtype == np.float32
    batch = processor(photographs, return_tensors="pt")
    assert list(batch) == ["pixel_values"] and torch.equal(batch["pixel_values"], torch.from_numpy(array))
    assert batch.to(torch.bfloat16).pixel_values.dtype == torch.bfloat16


def test_overrides_hold_for_one_call(photographs):
    processor = DeiTImageProcessor()
    assert processor(photographs, return_tensors="pt", crop_size=32).pixel_values.shape == (2, 3, 32, 32)
    assert processor.crop_size == {"height": 224, "width": 224}


# -- configuration files


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


# -- errors, all of them before any image is processed


@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, r"shape \(8, 8\)"),
        (torch.zeros(1, 1, 3, 8, 8), ValueError, "shape"),
        (torch.zeros(5, 8, 8), ValueError, "1, 3 or 4 channels"),
        (torch.zeros(4, 8, 8, dtype=torch.uint8), ValueError, "4 channels, image_mean 3"),
        (torch.zeros(1, 8, 8, dtype=torch.uint8), ValueError, "1 channels, image_mean 3"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), TypeError, "int64"),
        (np.zeros((8, 8, 3), dtype=bool), TypeError, "bool"),
        (np.zeros((8, 8, 3), dtype=complex), TypeError, "complex"),
        (torch.zeros(3, 0, 8), ValueError, "no pixels"),
        (Image.new("RGB", (0, 4)), ValueError, "no pixels"),
        (torch.zeros(1, 1, 1).expand(3, 40_000, 25_000), ValueError, "1,000,000,000 pixels"),
        (np.broadcast_to(np.uint8(0), (40_000, 25_000, 3)), ValueError, "1,000,000,000 pixels"),
        (Image.new("P", (8, 8)), ValueError, "do_convert_rgb"),
        (Image.new("L", (8, 8)), ValueError, "do_convert_rgb"),
        (None, TypeError, "NoneType"),
        (3.5, TypeError, "float"),
        ([], ValueError, "no images"),
    ],
    ids=lambda value: None if isinstance(value, str) else getattr(value, "__name__", None),
)
def test_unusable_images_are_refused_before_any_work(monkeypatch, photographs, image, error, message):
    monkeypatch.setattr(DeiTImageProcessor, "_process", lambda *_: pytest.fail("an image was processed"))
    images = image if isinstance(image, list) else [photographs[0], image]
    with pytest.raises(error, match=message):
        DeiTImageProcessor()(images, return_tensors="pt")


def test_the_refusal_names_the_image(photographs):
    with pytest.raises(ValueError, match="image 1 "):
        DeiTImageProcessor()([photographs[0], photographs[1][:, :, 0]])


def test_images_of_no_fixed_range_are_not_converted():
    with pytest.raises(ValueError, match="'F'"):
        DeiTImageProcessor(do_convert_rgb=True)(Image.new("F", (8, 8)))


def test_shapes_that_do_not_stack_are_refused(photographs):
    processor = DeiTImageProcessor(do_resize=False, do_center_crop=False)
    images = [photographs[0], photographs[1][:-1]]
    with pytest.raises(ValueError, match="do not stack"):
        processor(images, return_tensors="pt")
    assert len(processor(images).pixel_values) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": {"height": 4}},
        {"size": True},
        {"crop_size": {"shortest_edge": 4}},
        {"crop_size": (4, 4.5)},
        {"resample": 4},
        {"rescale_factor": 0},
        {"image_mean": "grey"},
        {"image_std": [0.5, 0, 0.5]},
        {"pad_size": -1},
    ],
    ids=str,
)
def test_a_wrong_setting_is_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        DeiTImageProcessor(**settings)


def test_wrong_call_arguments_are_named(photographs):
    with pytest.raises(ValueError, match="return_tensors"):
        DeiTImageProcessor()(photographs, return_tensors="tf")
    with pytest.raises(ValueError, match="input_data_format"):
        DeiTImageProcessor()(photographs, input_data_format="nchw")
    with pytest.raises(TypeError, match="siz"):
        DeiTImageProcessor()(photographs, siz=3)
    with pytest.raises(ValueError, match="pad_size"):
        DeiTImageProcessor(do_pad=True, pad_size=100)(photographs)
