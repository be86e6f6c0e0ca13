"""The processor against transformers' own, on real photographs and on what is hard for it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deit_fast.data import DeiTImageProcessor

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")
pytest.importorskip("torchvision")
from torchvision.transforms import InterpolationMode  # noqa: E402
from transformers.image_utils import ChannelDimension, SizeDict  # noqa: E402
from transformers.utils import TensorType  # noqa: E402

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


BACKENDS = [transformers.DeiTImageProcessor, transformers.DeiTImageProcessorPil]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"shortest_edge": 256, "longest_edge": 300}},  # 427 x 640 would be 383 long
        {"size": {"shortest_edge": 256, "longest_edge": 1000}},
        {"size": {"shortest_edge": 427, "longest_edge": 1000}},  # the edge it has
        {"size": {"max_height": 300, "max_width": 250}},
        {"size": {"longest_edge": 300}, "do_resize": False},
        {"size": None, "do_resize": None},
        {"crop_size": {"shortest_edge": 200}, "do_center_crop": False},
        {"crop_size": None, "do_center_crop": None},
        {"rescale_factor": None, "do_rescale": None},
        {"resample": InterpolationMode.NEAREST_EXACT},
        {"resample": InterpolationMode.BILINEAR},
        {"resample": InterpolationMode.BICUBIC},
        {"resample": InterpolationMode.LANCZOS},
        {"data_format": "channels_last"},  # read by neither: channels come first
        {"data_format": ChannelDimension.FIRST},
        {"disable_grouping": True},
        {"image_seq_length": 196},
    ],
    ids=str,
)
def test_more_settings_match_both_backends_of_transformers(photographs, settings, turned):
    photograph = photographs[1].transpose(1, 0, 2) if turned else photographs[1]
    level = 1.0 if settings.get("do_rescale", 0) is None else LEVEL
    torchvision, pillow = (backend(**settings) for backend in BACKENDS)
    pixels = assert_same(DeiTImageProcessor(**settings), torchvision, photograph, std=0.5, level=level)
    # The two differ from each other by levels, where Pillow rounds between rows and columns.
    expected, other = (each(photograph, return_tensors="pt").pixel_values for each in (pillow, torchvision))
    assert pixels.shape == expected.shape and pixels.dtype == expected.dtype
    between = (other.float() - expected.float()).abs().max()
    assert (pixels.float() - expected.float()).abs().max() <= between + (level + ROUNDING) / 0.5


def test_settings_of_the_call_may_be_those_of_the_constructor(photographs):
    ours, theirs = (
        kind(return_tensors="pt", input_data_format="channels_last", device="cpu", size=200, default_to_square=False)
        for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor)
    )
    for overrides in ({}, {"size": 150}, {"return_tensors": None}, {"do_center_crop": None, "do_normalize": None}):
        actual, expected = (list(each(photographs[:1], **overrides).pixel_values) for each in (ours, theirs))
        torch.testing.assert_close(actual, expected, rtol=0, atol=(LEVEL + ROUNDING) / 0.5)
    assert isinstance(ours(photographs).pixel_values, torch.Tensor)


@pytest.mark.parametrize("resample", [InterpolationMode.NEAREST, "nearest", "bicubic"])
def test_filters_that_only_torchvision_has_match_its_backend(photographs, resample):
    ours, theirs = DeiTImageProcessor(resample=resample), transformers.DeiTImageProcessor(resample=resample)
    assert_same(ours, theirs, photographs[0], std=0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("do_rescale", [True, False])
def test_images_that_nothing_normalises_keep_their_dtype_as_in_transformers(photographs, do_rescale, dtype):
    image = torch.from_numpy(photographs[0]).permute(2, 0, 1).to(dtype)
    settings = {"do_normalize": False, "do_rescale": do_rescale}
    ours, theirs = (kind(**settings)(image) for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor))
    assert ours.pixel_values[0].dtype == dtype
    torch.testing.assert_close(ours.pixel_values, theirs.pixel_values)


def test_gradients_reach_the_images_as_in_transformers(photographs):
    image = torch.from_numpy(photographs[0]).permute(2, 0, 1).float().requires_grad_()
    gradients = []
    for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor):
        pixels = kind()(image, return_tensors="pt").pixel_values
        gradients.append(torch.autograd.grad(pixels.square().sum(), image)[0])
    torch.testing.assert_close(*gradients)
    assert isinstance(DeiTImageProcessor()(image, return_tensors="np").pixel_values, np.ndarray)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("data_format", [None, "none", "channels_first", "channels_last"])
def test_two_dimensional_images_match_transformers_whatever_their_format_is_called(photographs, data_format, backend):
    settings = {"image_mean": 0.5, "image_std": 0.25, "input_data_format": data_format}
    ours, theirs = DeiTImageProcessor(**settings), backend(**settings)
    # Without the outer list transformers refuses them.
    pixels = assert_same(ours, theirs, [[photographs[0][:, :, 0], photographs[1][:, :, 0]]], std=0.25)
    assert pixels.shape == (2, 1, 224, 224)
    assert torch.equal(ours(photographs[0][:, :, 0], return_tensors="pt").pixel_values, pixels[:1])


def test_images_of_no_format_are_taken_for_channels_first_as_in_transformers():
    image = torch.randint(256, (3, 30, 3), dtype=torch.uint8)
    assert_same(DeiTImageProcessor(), transformers.DeiTImageProcessor(), image, std=0.5, input_data_format="none")
    with pytest.raises(ValueError, match=r"shape \(30, 3, 3\)"):
        DeiTImageProcessor()(torch.zeros(30, 3, 3), input_data_format="none")


def test_enumerations_of_transformers_are_taken(photographs):
    ours, theirs = DeiTImageProcessor(), transformers.DeiTImageProcessor()
    kwargs = {"input_data_format": ChannelDimension.LAST, "resample": Image.Resampling.BILINEAR}
    kwargs["data_format"] = ChannelDimension.LAST  # not read
    expected = theirs(photographs, return_tensors=TensorType.NUMPY, **kwargs).pixel_values
    actual = ours(photographs, return_tensors=TensorType.NUMPY, **kwargs).pixel_values
    np.testing.assert_allclose(actual, expected, rtol=0, atol=(LEVEL + ROUNDING) / 0.5)


def test_one_mean_in_a_list_is_every_channels(photographs):
    settings = {"image_mean": [0.4], "image_std": [0.5]}
    assert_same(DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings), photographs[0], std=0.5)


@pytest.mark.parametrize("settings", [{"do_convert_rgb": True, "do_rescale": False}])
def test_alpha_is_not_blended_into_values_of_unknown_range(settings):
    image = 255 * torch.rand(4, 30, 30)
    for kind in (DeiTImageProcessor, transformers.DeiTImageProcessor):
        with pytest.raises(ValueError, match=r"0.* 1"):
            kind(**settings)(image)
    assert_same(DeiTImageProcessor(**settings), transformers.DeiTImageProcessor(**settings), image / 255, level=1e-5)


# -- the methods


STEPS = {
    "resize": [
        {"size": {"height": 30, "width": 20}},
        {"size": {"shortest_edge": 30, "longest_edge": 40}, "resample": 3},
        {"size": {"shortest_edge": 50}, "resample": InterpolationMode.NEAREST},
        {"size": {"max_height": 30, "max_width": 40}, "resample": 3, "antialias": False},
    ],
    "center_crop": [{"size": {"height": 33, "width": 200}}],
    "rescale": [{"scale": 0.5}],
    "normalize": [{"mean": [0.1, 0.2, 0.3], "std": (1.0, 2.0, 3.0)}],
    "rescale_and_normalize": [
        {"do_rescale": a, "rescale_factor": 0.5, "do_normalize": b, "image_mean": (0.1, 0.2, 0.3), "image_std": 2.0}
        for a in (True, False)
        for b in (True, False)
    ],
}


@pytest.mark.parametrize(("step", "kwargs"), [(step, kwargs) for step, all_ in STEPS.items() for kwargs in all_])
def test_each_step_is_a_method_as_in_transformers(step, kwargs):
    images = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    stock = {key: SizeDict(**value) if key == "size" else value for key, value in kwargs.items()}
    expected = getattr(transformers.DeiTImageProcessor(), step)(images, **stock)
    torch.testing.assert_close(getattr(DeiTImageProcessor(), step)(images, **kwargs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(getattr(DeiTImageProcessor(), step)(images[0], **kwargs), expected[0])


@pytest.mark.parametrize("pad_size", [None, {"height": 70, "width": 100}])
def test_padding_is_a_method_as_in_transformers(pad_size):
    images = [torch.rand(3, 60, 90), torch.rand(3, 65, 30)]
    stock = None if pad_size is None else SizeDict(**pad_size)
    expected = transformers.DeiTImageProcessor().pad(images, pad_size=stock, fill_value=2)
    assert torch.equal(torch.stack(DeiTImageProcessor().pad(images, pad_size, fill_value=2)), torch.stack(expected))


@pytest.mark.parametrize("rgb", [True, False])
@pytest.mark.parametrize("kind", ["RGB", "RGBA", "L", "array"])
def test_process_image_is_a_method_as_in_transformers(photographs, kind, rgb):
    image = photographs[0] if kind == "array" else Image.fromarray(photographs[0]).convert(kind)
    expected = transformers.DeiTImageProcessor().process_image(image, do_convert_rgb=rgb)
    assert torch.equal(DeiTImageProcessor().process_image(image, do_convert_rgb=rgb), expected)


def test_a_step_of_a_subclass_is_taken(photographs):
    class Darker(DeiTImageProcessor):
        def rescale(self, image, scale):
            return super().rescale(image, scale / 2)

    settings = {"do_normalize": False, "return_tensors": "pt"}
    expected = DeiTImageProcessor(**settings)(photographs).pixel_values / 2
    torch.testing.assert_close(Darker(**settings)(photographs, crop_size=224).pixel_values, expected)


def test_what_transformers_has_and_we_have_not_is_documented():
    limits = (Path(__file__).parents[2] / "docs" / "limits.md").read_text()
    theirs = {name for name in dir(transformers.DeiTImageProcessor()) if not name.startswith("_")}
    for name in theirs - set(dir(DeiTImageProcessor())):
        assert f"`{name}`" in limits, name


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


# -- errors, all of them before any image is processed


@pytest.mark.parametrize(
    "image, error, message",
    [
        (torch.zeros(8, 8, dtype=torch.uint8), ValueError, "1 channels, image_mean 3"),
        (torch.zeros(8, dtype=torch.uint8), ValueError, r"shape \(8,\)"),
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
        {"size": {"longest_edge": 4}},
        {"size": {"min_pixels": 4, "max_pixels": 8}},
        {"size": {"shortest_edge": 4, "max_height": 8}},
        {"size": None},
        {"crop_size": None},
        {"resample": 4},
        {"resample": 5},
        {"resample": "box"},
        {"resample": True},
        {"resample": None},
        {"rescale_factor": None},
        {"image_mean": None},
        {"image_std": None},
        {"data_format": "nchw"},
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
    with pytest.raises(ValueError, match="image 0 would be resized to 0 x 1"):
        DeiTImageProcessor(size={"max_height": 1, "max_width": 1})(photographs)
