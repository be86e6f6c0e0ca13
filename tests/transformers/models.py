"""Small models, stock and of deit_fast.transformers, with the same weights."""

import torch
import transformers
from torch import nn

import deit_fast.transformers
from tests.swap.helpers import randomise

CLASSES = [
    "DeiTModel",
    "DeiTForMaskedImageModeling",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "ViTModel",
    "ViTForImageClassification",
]
CLASSIFIERS = ["DeiTForImageClassification", "ViTForImageClassification"]


def config(class_name: str = "DeiTForImageClassification", **options) -> transformers.PreTrainedConfig:
    """Two layers of width 64, 32 pixels, patches of 8, 10 classes."""
    options = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "encoder_stride": 8,
        "num_labels": 10,
    } | options
    return (transformers.ViTConfig if class_name.startswith("ViT") else transformers.DeiTConfig)(**options)


def ours(class_name: str = "DeiTForImageClassification", seed: int = 0, **options) -> nn.Module:
    return randomise(getattr(deit_fast.transformers, class_name)(config(class_name, **options)), seed).eval()


def stock(class_name: str = "DeiTForImageClassification", seed: int = 0, **options) -> nn.Module:
    return randomise(getattr(transformers, class_name)(config(class_name, **options)), seed).eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    found, expected = a.state_dict(), b.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
