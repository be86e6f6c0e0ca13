import pytest
import torch

from reference import drop_path, drop_path_scale

timm_layers = pytest.importorskip("timm.layers")


@pytest.mark.parametrize("drop_prob", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_seeds_drop_the_samples_that_timm_drops(drop_prob, dtype):
    x = torch.randn(16, 5, 8, dtype=dtype)
    torch.manual_seed(3)
    expected = timm_layers.drop_path(x, drop_prob, training=True)
    torch.manual_seed(3)
    assert torch.equal(drop_path(x, drop_prob, training=True), expected)
    assert drop_path(x, drop_prob, training=False) is x


def test_scale_is_zero_or_the_inverse_of_the_keep_probability():
    scale = drop_path_scale(torch.zeros(1000, 2, 3), 0.25)
    assert scale.shape == (1000,)
    assert sorted(set(scale.tolist())) == pytest.approx([0.0, 1 / 0.75])
    assert drop_path_scale(torch.zeros(4, 2, 3), 1.0).tolist() == [0.0] * 4
