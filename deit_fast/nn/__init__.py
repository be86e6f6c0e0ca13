"""Drop-in modules over the operators, with timm's constructor signatures and parameter names."""

from deit_fast.nn.attention import Attention
from deit_fast.nn.block import Block
from deit_fast.nn.layer_norm import LayerNorm
from deit_fast.nn.mlp import Mlp
from deit_fast.nn.patch_embed import PatchEmbed
from deit_fast.nn.residual import DropPath, LayerScale

__all__ = ["Attention", "Block", "DropPath", "LayerNorm", "LayerScale", "Mlp", "PatchEmbed"]
