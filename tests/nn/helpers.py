"""The modules beside timm's."""

import timm
from timm.models import vision_transformer as timm_vit
from torch import nn

from deit_fast import nn as fast

WIDTH, HEADS = 64, 2

PAIRS = {
    "layer_norm": (fast.LayerNorm, timm.layers.LayerNorm, {"num_channels": WIDTH}),
    "attention": (fast.Attention, timm.layers.Attention, {"dim": WIDTH, "num_heads": HEADS, "qkv_bias": True}),
    "wide heads": (
        fast.Attention,
        timm.layers.Attention,
        {"dim": WIDTH, "num_heads": 3, "attn_head_dim": 32, "dim_out": 40},
    ),
    "mlp": (fast.Mlp, timm.layers.Mlp, {"in_features": WIDTH, "hidden_features": 96, "out_features": 32}),
    "relu mlp": (fast.Mlp, timm.layers.Mlp, {"in_features": WIDTH, "act_layer": nn.ReLU, "bias": (True, False)}),
    "block": (fast.Block, timm_vit.Block, {"dim": WIDTH, "num_heads": HEADS, "qkv_bias": True}),
    "layer scale block": (fast.Block, timm_vit.Block, {"dim": WIDTH, "num_heads": HEADS, "init_values": 0.1}),
    "wide block": (fast.Block, timm_vit.Block, {"dim": 224, "num_heads": 7, "qkv_bias": True}),
}


def same_weights(ours: nn.Module, stock: nn.Module) -> None:
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(stock.state_dict())
