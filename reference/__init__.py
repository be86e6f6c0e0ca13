"""DeiT in plain PyTorch: the specification every operator of this project is checked against.

One file beside each operator, with the operator's name and argument order. The mathematics is written out
(softmax, LayerNorm, convolution, interpolation) and computed in the input's dtype: give float64 to get the
reference values. Imports torch only.

Papers: An Image is Worth 16x16 Words (ViT, arXiv 2010.11929), Training data-efficient image transformers
(DeiT, arXiv 2012.12877), Going deeper with Image Transformers (LayerScale, arXiv 2103.17239), DeiT III (arXiv
2204.07118).
"""

from reference.activation import activate, gelu, gelu_tanh
from reference.attention import attention, attention_qkv
from reference.block import block
from reference.deit import deit, deit_features
from reference.drop_path import drop_path, drop_path_scale
from reference.feed_forward import fc2_residual, layer_norm_fc1
from reference.layer_norm import add_layer_norm, layer_norm
from reference.layer_scale import layer_scale
from reference.linear import layer_norm_linear, layer_norm_qkv, linear, linear_residual
from reference.mlp import mlp
from reference.patch_embed import patch_embed
from reference.pixels import normalise_pixels
from reference.pos_embed import interpolate_pos_embed
from reference.readout import readout, readout_attention, readout_block

__all__ = [
    "activate",
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "block",
    "deit",
    "deit_features",
    "drop_path",
    "drop_path_scale",
    "fc2_residual",
    "gelu",
    "gelu_tanh",
    "interpolate_pos_embed",
    "layer_norm",
    "layer_norm_fc1",
    "layer_norm_linear",
    "layer_norm_qkv",
    "layer_scale",
    "linear",
    "linear_residual",
    "mlp",
    "normalise_pixels",
    "patch_embed",
    "readout",
    "readout_attention",
    "readout_block",
]
