import pytest
import torch

from deit_fast.models.input_channels import adapt_input_channels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("in_chans", [1, 2, 3, 4, 6, 7])
def test_the_formula_is_timms(in_chans, dtype):
    layers = pytest.importorskip("timm.models")
    weight = torch.randn(8, 3, 4, 4).to(dtype)
    assert torch.equal(adapt_input_channels(weight, in_chans), layers.adapt_input_conv(in_chans, weight))


def test_any_number_of_channels_can_be_the_source():
    weight = torch.randn(8, 2, 4, 4)
    assert torch.equal(adapt_input_channels(weight, 4), torch.cat([weight, weight], dim=1) / 2)
    grey = weight[:, :1]
    torch.testing.assert_close(adapt_input_channels(grey, 3), grey.expand(-1, 3, -1, -1) / 3)


@pytest.mark.parametrize("shape", [(8, 3, 4, 4), (8, 48), (8, 0, 4, 4)])
def test_the_wanted_channels_and_what_is_no_patch_embedding_come_back_as_they_are(shape):
    weight = torch.randn(shape)
    assert adapt_input_channels(weight, 3) is weight
