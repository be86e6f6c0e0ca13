import pytest
import torch

import reference
from deit_fast import ops
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import BATCHES, DTYPES, assert_op_is_right, randn, strided

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def weight_of(width, channels, patch, dtype):
    return randn(width, channels, patch, patch, dtype=dtype, scale=(channels * patch * patch) ** -0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("positions", ["none", "patches", "all"])
def test_prefix_tokens_and_both_kinds_of_positions(prefix, positions, dtype):
    width, patches = 64, 6
    rows = {"none": None, "patches": patches, "all": prefix + patches}[positions]
    pos_embed = None if rows is None else randn(1, rows, width, dtype=dtype)
    cls_token = randn(1, 1, width, dtype=dtype) if prefix > 0 else None
    dist_token = randn(1, 1, width, dtype=dtype) if prefix > 1 else None
    images, bias = randn(2, 3, 32, 48, dtype=dtype), randn(width, dtype=dtype)
    assert_op_is_right("patch_embed", images, weight_of(width, 3, 16, dtype), bias, pos_embed, cls_token, dist_token)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100, 192, 384])
@pytest.mark.parametrize("patch", [4, 14, 16])
def test_any_width_and_patch(width, patch, dtype):
    images, token = randn(2, 3, 3 * patch, 2 * patch, dtype=dtype), randn(1, 1, width, dtype=dtype)
    assert_op_is_right("patch_embed", images, weight_of(width, 3, patch, dtype), None, None, token)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_any_batch_and_channels(batch, channels, dtype):
    images, token = randn(batch, channels, 16, 24, dtype=dtype), randn(1, 1, 48, dtype=dtype)
    pos_embed = randn(1, 8, 48, dtype=dtype)
    weight = weight_of(48, channels, 8, dtype)
    assert_op_is_right("patch_embed", images, weight, None, pos_embed, token, token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_more_patches_than_a_tile(dtype):
    images, token = randn(3, 3, 64, 64, dtype=dtype), randn(1, 1, 32, dtype=dtype)
    assert_op_is_right("patch_embed", images, weight_of(32, 3, 8, dtype), None, randn(1, 65, 32, dtype=dtype), token)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask_tokens_replace_patches_before_positions(dtype):
    images, token, mask_token = randn(2, 3, 32, 32, dtype=dtype), *(randn(1, 1, 64, dtype=dtype) for _ in range(2))
    mask = torch.tensor([[True, False, False, True], [False, False, False, False]])
    pos_embed, weight = randn(1, 6, 64, dtype=dtype), weight_of(64, 3, 16, dtype)
    assert_op_is_right("patch_embed", images, weight, None, pos_embed, token, token, mask_token, mask)
    assert_op_is_right("patch_embed", images, weight, None, None, None, None, mask_token, strided(mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8_images_are_normalised_on_the_way_in(dtype):
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    token, weight = randn(1, 1, 64, dtype=dtype), weight_of(64, 3, 16, dtype)
    assert_op_is_right("patch_embed", images, weight, None, None, token, None, None, None, MEAN, STD)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    images, weight = randn(2, 3, 32, 32, dtype=dtype), weight_of(64, 3, 16, dtype)
    channels_last = images.contiguous(memory_format=torch.channels_last)
    for view in (strided(images), channels_last, images[:1].expand(2, 3, 32, 32), images.flip(3)[:, :, :, :16]):
        assert_op_is_right("patch_embed", view, weight.contiguous(memory_format=torch.channels_last))
    assert_op_is_right("patch_embed", images, strided(weight), strided(randn(64, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_spoil_their_own_patch_only(dtype):
    images = randn(1, 3, 32, 32, dtype=dtype)
    images[0, 0, 0, 0], images[0, 1, 20, 20] = torch.nan, torch.inf
    y = assert_op_is_right("patch_embed", images, weight_of(64, 3, 16, dtype))[0]
    assert y.isfinite().all(dim=-1).tolist() == [[False, True, True, False]]


def test_autocast_projects_in_16_bits_and_adds_float32_positions():
    images, weight = torch.randn(2, 3, 32, 32), torch.randn(64, 3, 16, 16) / 28
    pos_embed, token = torch.randn(1, 5, 64), torch.randn(1, 1, 64)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = ops.patch_embed(images, weight, None, pos_embed, token)
        patches = torch.nn.functional.conv2d(images, weight, stride=16).flatten(2).transpose(1, 2)
        stock = torch.cat((token.expand(2, -1, -1), patches), 1) + pos_embed
    wide = [each.double() for each in (images, weight, pos_embed, token)]
    exact = reference.patch_embed(wide[0], wide[1], None, wide[2], wide[3])
    assert_as_accurate_as_stock(tokens, stock, exact, torch.float32, "tokens")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.ones(3, 32, 32)}, ValueError, r"\[batch, channels, height, width\], got \(3, 32, 32\)"),
        ({"images": torch.ones(1, 4, 32, 32)}, ValueError, "takes 3 channels, the images have 4"),
        ({"images": torch.ones(1, 3, 32, 33)}, ValueError, "image width must be a positive multiple .* 16, got 33"),
        ({"images": torch.ones(1, 3, 0, 32)}, ValueError, "image height must be a positive multiple .* got 0"),
        ({"images": torch.ones(1, 3, 32, 32, dtype=torch.int32)}, TypeError, "got torch.int32"),
        ({"images": torch.ones(1, 3, 32, 32).half()}, TypeError, "the input is torch.float16"),
        ({"images": torch.ones(1, 3, 32, 32, dtype=torch.uint8)}, ValueError, "need mean and std"),
        ({"mean": MEAN, "std": STD}, ValueError, "go with uint8 images"),
        ({"pos_embed": torch.ones(1, 7, 64)}, ValueError, r"\(1, 4, 64\) or \(1, 5, 64\) for these images"),
        ({"cls_token": torch.ones(64)}, ValueError, r"cls_token must have shape \(1, 1, 64\)"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, "mask and mask_token go together"),
        ({"weight": torch.ones(64, 3, 16, 16, device="meta")}, ValueError, "weight is on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, error, message):
    arguments = {
        "images": torch.ones(1, 3, 32, 32),
        "weight": torch.ones(64, 3, 16, 16),
        "cls_token": torch.ones(1, 1, 64),
    }
    with pytest.raises(error, match=message):
        ops.patch_embed(**(arguments | change))
