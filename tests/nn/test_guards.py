import torch
from timm.models import vision_transformer as timm_vit

from deit_fast import nn as fast
from tests.nn.helpers import HEADS, WIDTH, same_weights


def test_a_hook_on_an_inner_module_is_called():
    block = fast.Block(WIDTH, HEADS).eval()
    x, seen = torch.randn(1, 5, WIDTH), []
    with torch.no_grad():
        whole = block(x)
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        torch.testing.assert_close(block(x), whole, atol=1e-5, rtol=1e-5)
    assert seen == [(1, 5, 4 * WIDTH)]


def test_dropout_in_training_is_not_forgotten():
    block = fast.Block(WIDTH, HEADS, proj_drop=0.5, attn_drop=0.5)
    x = torch.randn(1, 5, WIDTH)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_masks_and_causality_reach_the_attention():
    ours, stock = fast.Block(WIDTH, HEADS).eval(), timm_vit.Block(WIDTH, HEADS).eval()
    same_weights(ours, stock)
    x, mask = torch.randn(1, 5, WIDTH), torch.rand(5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, attn_mask=mask), stock(x, attn_mask=mask))
        torch.testing.assert_close(ours(x, is_causal=True), stock(x, is_causal=True))
