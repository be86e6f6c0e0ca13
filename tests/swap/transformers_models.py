"""Small models of transformers, and what a swapped one calls."""

import torch
import transformers
from torch import nn

from tests.swap.helpers import assert_close, randomise

CLASSES = [
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
    "ViTModel",
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
]
LAYER = {"layer_norm_linear": 2, "attention": 1, "linear_residual": 2}
LAYERS = 2


def config(class_name: str = "DeiTForImageClassification", **options) -> transformers.PreTrainedConfig:
    """Two layers of width 64, 32 pixels, patches of 8, 10 classes."""
    options = {
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "encoder_stride": 8,
        "num_labels": 10,
    } | options
    return (transformers.ViTConfig if class_name.startswith("ViT") else transformers.DeiTConfig)(**options)


def build(class_name: str = "DeiTForImageClassification", attention: str = "sdpa", **options) -> nn.Module:
    asked = config(class_name, **options)
    asked._attn_implementation = attention
    return randomise(getattr(transformers, class_name)(asked)).eval()


def pixels(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def layer_calls(layers: int = LAYERS, *, readout: bool = True, **others: int) -> dict[str, int]:
    """What a classifier calls without gradients; with `readout` its last layer for the rows that are read alone."""
    calls = {op: layers * n for op, n in LAYER.items()}
    if readout:
        calls |= {"layer_norm_linear": 2 * layers - 1, "attention": layers - 1, "readout_attention": 1}
    calls |= {"patch_embed": 1, "layer_norm": 1} | others
    return {op: count for op, count in calls.items() if count}


def assert_outputs_close(result, expected) -> None:
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, tuple):
            assert len(result[key]) == len(value)
            for ours, stock in zip(result[key], value, strict=True):
                assert_close(ours, stock)
        else:
            assert_close(result[key], value)
