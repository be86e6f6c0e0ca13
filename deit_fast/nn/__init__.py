"""Drop-in modules over the operators, with timm's constructor signatures and parameter names."""

from deit_fast.nn.attention import Attention
from deit_fast.nn.block import Block
from deit_fast.nn.drop_path import DropPath
from deit_fast.nn.layer_norm import LayerNorm
from deit_fast.nn.layer_scale import LayerScale
from deit_fast.nn.mlp import Mlp
from deit_fast.nn.patch_embed import PatchEmbed

__all__ = ["Attention", "Block", "DropPath", "LayerNorm", "LayerScale", "Mlp", "PatchEmbed"]
