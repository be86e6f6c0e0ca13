"""The dispatcher operators `torch.ops.deit_fast.*` and the functions to call them by."""

from deit_fast.ops.attention import attention, attention_qkv
from deit_fast.ops.drop_path import keep_samples, known_count
from deit_fast.ops.layer_norm import add_layer_norm, layer_norm
from deit_fast.ops.linear import (
    layer_norm_linear,
    layer_norm_linear_branching,
    layer_norm_qkv,
    layer_norm_qkv_branching,
    linear,
    linear_residual,
)
from deit_fast.ops.loss import distillation_loss
from deit_fast.ops.mlp import mlp
from deit_fast.ops.patch_embed import patch_embed
from deit_fast.ops.readout import readout_attention, readout_attention_qkv

from deit_fast.ops import flops  # noqa: F401, isort: skip  (their formulas, once they are all defined)

__all__ = [
    "add_layer_norm",
    "attention",
    "attention_qkv",
    "distillation_loss",
    "keep_samples",
    "known_count",
    "layer_norm",
    "layer_norm_linear",
    "layer_norm_linear_branching",
    "layer_norm_qkv",
    "layer_norm_qkv_branching",
    "linear",
    "linear_residual",
    "mlp",
    "patch_embed",
    "readout_attention",
    "readout_attention_qkv",
]
