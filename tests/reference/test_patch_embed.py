import pytest
import torch
from torch.nn import functional as F

from reference import patch_embed

D, P = 20, 6  # width, patches


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    weight, bias = torch.randn(D, 3, 4, 4, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    return images, weight, bias


def convolution(images, weight, bias):
    return F.conv2d(images, weight, bias, stride=4).flatten(2).transpose(1, 2)


def tokens(count):
    return torch.randn(count, 1, 1, D, dtype=torch.float64)


def test_patches_are_a_strided_convolution_in_row_major_order(inputs):
    torch.testing.assert_close(patch_embed(*inputs), convolution(*inputs))
    torch.testing.assert_close(patch_embed(*inputs[:2]), convolution(*inputs[:2], None))


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_positions_of_the_whole_sequence_are_added_to_the_prefix_tokens_too(inputs, prefix):
    prefix_tokens = tokens(prefix)
    pos_embed = torch.randn(1, prefix + P, D, dtype=torch.float64)
    expected = torch.cat([*(t.expand(2, 1, D) for t in prefix_tokens), convolution(*inputs)], dim=1) + pos_embed
    torch.testing.assert_close(patch_embed(*inputs, pos_embed, *prefix_tokens), expected)


@pytest.mark.parametrize("prefix", [1, 2])
def test_positions_of_the_patches_alone_leave_the_prefix_tokens_as_they_are(inputs, prefix):
    prefix_tokens = tokens(prefix)
    pos_embed = torch.randn(1, P, D, dtype=torch.float64)
    expected = torch.cat([*(t.expand(2, 1, D) for t in prefix_tokens), convolution(*inputs) + pos_embed], dim=1)
    torch.testing.assert_close(patch_embed(*inputs, pos_embed, *prefix_tokens), expected)


def test_a_masked_patch_is_the_mask_token_at_its_position(inputs):
    cls_token, mask_token = tokens(2)
    mask = torch.rand(2, P) < 0.5
    pos_embed = torch.randn(1, 1 + P, D, dtype=torch.float64)
    masked = patch_embed(*inputs, pos_embed, cls_token, mask_token=mask_token, mask=mask)
    plain = patch_embed(*inputs, pos_embed, cls_token)
    at_mask = (mask_token + pos_embed[:, 1:]).expand(2, P, D)
    torch.testing.assert_close(masked[:, 1:][mask], at_mask[mask])
    assert torch.equal(masked[:, 1:][~mask], plain[:, 1:][~mask])
    assert torch.equal(masked[:, 0], plain[:, 0])


def test_uint8_images_are_rescaled_and_normalised_by_channel(inputs):
    _, weight, bias = inputs
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
    normalised = (images.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    expected = patch_embed(normalised, weight, bias)
    torch.testing.assert_close(patch_embed(images, weight, bias, mean=mean, std=std), expected)

    folded_weight = weight / (255 * std.view(3, 1, 1))
    folded_bias = bias - (weight * (mean / std).view(3, 1, 1)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(patch_embed(images.double(), folded_weight, folded_bias), expected)
