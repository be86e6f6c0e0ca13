import pytest
import torch
from torch.nn import functional as F

from reference import interpolate_pos_embed
from reference.pos_embed import resize_matrix

GRIDS = [((14, 14), (24, 24)), ((24, 24), (14, 14)), ((14, 14), (16, 7)), ((3, 5), (5, 3)), ((7, 7), (2, 14))]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_interpolation_is_torchs_bicubic(old, new, antialias):
    pos_embed = torch.randn(1, 2 + old[0] * old[1], 8, dtype=torch.float64)
    grid = pos_embed[:, 2:].unflatten(1, old).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=new, mode="bicubic", antialias=antialias).flatten(2).transpose(1, 2)
    result = interpolate_pos_embed(pos_embed, 2, old, new, antialias)
    assert torch.equal(result[:, :2], pos_embed[:, :2])
    torch.testing.assert_close(result[:, 2:], expected, rtol=1e-10, atol=1e-12)


def test_interpolation_is_timms():
    layers = pytest.importorskip("timm.layers")
    pos_embed = torch.randn(1, 1 + 14 * 14, 8)
    expected = layers.resample_abs_pos_embed(pos_embed, (24, 24), num_prefix_tokens=1)
    torch.testing.assert_close(interpolate_pos_embed(pos_embed, 1, (14, 14), (24, 24)), expected)


@pytest.mark.parametrize("antialias", [True, False])
def test_the_same_size_is_the_identity_and_constants_stay_constant(antialias):
    torch.testing.assert_close(resize_matrix(9, 9, antialias), torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(resize_matrix(14, 24, antialias).sum(dim=1), torch.ones(24, dtype=torch.float64))
