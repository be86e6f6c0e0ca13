"""Attributes of timm's modules that are changed after the swap, and read where stock reads them."""

import copy

import pytest
import torch
from torch import nn

import deit_fast
from deit_fast.swap import swap
from tests.swap.helpers import assert_close
from tests.swap.situations import images, vit


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("factor", [3.0, torch.tensor(3.0)], ids=["number", "tensor"])
def test_a_changed_scale_counts_where_stock_reads_it(factor, fused) -> None:
    model, x = vit(), images()
    stock = copy.deepcopy(model)
    swap(model)
    for each in (model, stock):
        for block in each.blocks:
            block.attn.scale = block.attn.scale * factor
            block.attn.fused_attn = fused
    with torch.inference_mode():
        assert_close(model(x), stock(x))
    assert bool(deit_fast.report(model).stock) == (isinstance(factor, torch.Tensor) and not fused)


def test_pruned_heads_are_stocks() -> None:
    model, x = vit(), images()
    stock = copy.deepcopy(model)
    swap(model)
    for each in (model, stock):
        attn = each.blocks[0].attn
        rows = torch.arange(3 * 96).view(3, 3, 32)[:, :2].flatten()
        attn.qkv.weight, attn.qkv.bias = nn.Parameter(attn.qkv.weight[rows]), nn.Parameter(attn.qkv.bias[rows])
        attn.proj.weight = nn.Parameter(attn.proj.weight[:, :64])
        attn.num_heads, attn.attn_dim = 2, 64
    with torch.inference_mode():
        assert_close(model(x), stock(x))
    assert deit_fast.report(model).stock == {}


def test_positions_follow_no_embed_class() -> None:
    model, x = vit(), images()
    swap(model)
    model.no_embed_class = True
    with pytest.raises(RuntimeError, match="size of tensor"):
        model(x)
