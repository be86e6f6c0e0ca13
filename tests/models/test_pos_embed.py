import pytest
import torch

from deit_fast.models.pos_embed import resample_pos_embed
from reference import interpolate_pos_embed


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (14, 16)])
def test_interpolation_is_timms(old, new, prefix):
    layers = pytest.importorskip("timm.layers")
    pos_embed = torch.randn(1, prefix + old * old, 8)
    result = resample_pos_embed(pos_embed, prefix, (new, new))
    # Bit for bit: both call the same operator on tensors of the same strides.
    assert torch.equal(result, layers.resample_abs_pos_embed(pos_embed, [new, new], num_prefix_tokens=prefix))
    torch.testing.assert_close(result, interpolate_pos_embed(pos_embed, prefix, (old, old), (new, new)))


@pytest.mark.parametrize("new", [(14, 24), (24, 7), (3, 5)])
def test_interpolation_to_a_grid_that_is_no_square_is_timms(new):
    layers = pytest.importorskip("timm.layers")
    pos_embed = torch.randn(1, 1 + 14 * 14, 8)
    result = resample_pos_embed(pos_embed, 1, new)
    assert torch.equal(result, layers.resample_abs_pos_embed(pos_embed, list(new), num_prefix_tokens=1))
    torch.testing.assert_close(result, interpolate_pos_embed(pos_embed, 1, (14, 14), new))


def test_half_precision_is_interpolated_in_float32():
    pos_embed = torch.randn(1, 1 + 14 * 14, 8).half()
    expected = resample_pos_embed(pos_embed.float(), 1, (24, 24)).half()
    assert torch.equal(resample_pos_embed(pos_embed, 1, (24, 24)), expected)


@pytest.mark.parametrize("shape", [(1, 1 + 14 * 14, 8), (1, 200, 8), (197, 8), (1, 1, 8)])
def test_the_wanted_grid_and_what_is_no_grid_come_back_as_they_are(shape):
    pos_embed = torch.randn(shape)
    assert resample_pos_embed(pos_embed, 1, (14, 14)) is pos_embed


def test_a_grid_of_as_many_patches_is_kept_as_timm_keeps_it():
    # Of a model of such images, or of square ones: nobody tells.
    pos_embed = torch.randn(1, 1 + 16, 8)
    assert resample_pos_embed(pos_embed, 1, (2, 8)) is pos_embed


@pytest.mark.parametrize("new", [(4, 4), (2, 8), (3, 5)])
def test_a_known_source_is_interpolated_as_timm_does(new):
    layers = pytest.importorskip("timm.layers")
    pos_embed = torch.randn(1, 1 + 16, 8)
    expected = layers.resample_abs_pos_embed(pos_embed, list(new), [8, 2], num_prefix_tokens=1)
    assert torch.equal(resample_pos_embed(pos_embed, 1, new, source=(8, 2)), expected)
