"""The dispatcher operators `torch.ops.deit_fast.*` and the functions to call them by."""

from deit_fast.ops.attention import attend, attention
from deit_fast.ops.attention_half import AttentionHalf, attention_half
from deit_fast.ops.drop_path import keep_samples, known_count
from deit_fast.ops.feed_forward import fc2_residual, layer_norm_fc1, layer_norm_fc1_branching
from deit_fast.ops.layer_norm import add_layer_norm, layer_norm
from deit_fast.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_branching
from deit_fast.ops.linear import linear, linear_residual
from deit_fast.ops.loss import distillation_loss
from deit_fast.ops.mlp import mlp, mlp_fits
from deit_fast.ops.mlp_half import MlpHalf, mlp_half
from deit_fast.ops.patch_embed import patch_embed
from deit_fast.ops.pixels import normalise_pixels
from deit_fast.ops.readout import readout_attention

__all__ = [
    "AttentionHalf",
    "MlpHalf",
    "add_layer_norm",
    "attend",
    "attention",
    "attention_half",
    "distillation_loss",
    "fc2_residual",
    "keep_samples",
    "known_count",
    "layer_norm",
    "layer_norm_fc1",
    "layer_norm_fc1_branching",
    "layer_norm_linear",
    "layer_norm_linear_branching",
    "linear",
    "linear_residual",
    "mlp",
    "mlp_fits",
    "mlp_half",
    "normalise_pixels",
    "patch_embed",
    "readout_attention",
]
