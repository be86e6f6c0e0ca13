"""Small models, stock and of deit_fast.transformers, with the same weights."""

import torch
import transformers
from torch import nn

import deit_fast.transformers
from tests.swap.helpers import randomise
from tests.swap.transformers_models import config

CLASSES = [
    "DeiTModel",
    "DeiTForMaskedImageModeling",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "ViTModel",
    "ViTForImageClassification",
]
CLASSIFIERS = ["DeiTForImageClassification", "ViTForImageClassification"]


def ours(class_name: str = "DeiTForImageClassification", seed: int = 0, **options) -> nn.Module:
    return randomise(getattr(deit_fast.transformers, class_name)(config(class_name, **options)), seed).eval()


def stock(class_name: str = "DeiTForImageClassification", seed: int = 0, **options) -> nn.Module:
    return randomise(getattr(transformers, class_name)(config(class_name, **options)), seed).eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    found, expected = a.state_dict(), b.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
