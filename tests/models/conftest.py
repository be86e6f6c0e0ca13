from dataclasses import replace

import pytest
import torch

from deit_fast.models.registry import get_config


def _small(name):
    """Two blocks, four patches along a side of the image."""
    return {"depth": 2, "img_size": 56 if "patch14" in name else 64, "num_classes": 10}


def _randomise(model):
    """Weights large enough that every branch, one behind a LayerScale too, shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def small_config():
    """`small_config(name, **changes)`: a registered configuration made small."""
    return lambda name, **changes: replace(get_config(name), **(_small(name) | changes))


@pytest.fixture(scope="session")
def timm_model():
    """`timm_model(name, **kwargs)`: timm's, at the size of `small_config`, with random weights."""
    timm = pytest.importorskip("timm")
    return lambda name, **kwargs: _randomise(timm.create_model(name, **(_small(name) | kwargs)))


@pytest.fixture(scope="session")
def transformers_model():
    """`transformers_model(class_name, **kwargs)`: transformers', deit_tiny's width, small."""
    transformers = pytest.importorskip("transformers")

    def build(class_name, **kwargs):
        config_class = transformers.ViTConfig if class_name.startswith("ViT") else transformers.DeiTConfig
        width = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
        size = {"num_hidden_layers": 2, "image_size": 64, "num_labels": 10}
        config = config_class(**(width | size | kwargs))
        return _randomise(getattr(transformers, class_name)(config))

    return build


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
