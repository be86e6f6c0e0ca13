import pytest
import torch

from reference import mlp

timm_vit = pytest.importorskip("timm.models.vision_transformer")


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_mlp_is_the_second_half_of_timms_block(init_values):
    torch.manual_seed(0)
    block = timm_vit.Block(48, num_heads=3, init_values=init_values, dtype=torch.float64)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    norm, fc1, fc2 = block.norm2, block.mlp.fc1, block.mlp.fc2
    gamma = None if init_values is None else block.ls2.gamma
    y = mlp(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias, gamma)
    torch.testing.assert_close(y, x + block.ls2(block.mlp(block.norm2(x))))
