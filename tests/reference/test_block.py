import pytest
import torch

from reference import block

timm_vit = pytest.importorskip("timm.models.vision_transformer")


def make_timm_block(**kwargs):
    torch.manual_seed(0)
    stock = timm_vit.Block(48, num_heads=3, dtype=torch.float64, **kwargs)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return stock


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("init_values", [None, 1e-6])
def test_block_is_timms(qkv_bias, init_values):
    stock = make_timm_block(qkv_bias=qkv_bias, init_values=init_values)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    torch.testing.assert_close(block(x, stock.state_dict(), 3, eps=stock.norm1.eps), stock(x))


def test_drop_path_scales_each_branch_by_sample():
    stock = make_timm_block(init_values=1e-6)
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    keep, drop = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = block(x, stock.state_dict(), 3, stock.norm1.eps, keep, drop)
    attention_only = x + stock.ls1(stock.attn(stock.norm1(x)))
    mlp_only = x + stock.ls2(stock.mlp(stock.norm2(x)))
    torch.testing.assert_close(y, torch.stack([attention_only[0], mlp_only[1]]))
