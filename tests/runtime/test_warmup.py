import pytest
import timm
import torch
from torch import nn

import deit_fast
from deit_fast.models import DeiTConfig
from deit_fast.models.deit import VisionTransformer
from deit_fast.ops import backend

CONFIG = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 10}


def distilled(**options) -> nn.Module:
    model = timm.models.deit.VisionTransformerDistilled(**CONFIG, **options)
    deit_fast.swap(model)
    return model


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels."""
    from deit_fast.kernels.launching import run

    names = set()
    stock = run._run

    def noted(kernel, *rest) -> None:
        names.add(kernel.fn.__name__)
        stock(kernel, *rest)

    monkeypatch.setattr(run, "_run", noted)
    return names


@pytest.mark.parametrize("training", [False, True])
def test_every_kernel_of_a_step_runs_once_before_it(training, launched):
    model = distilled(drop_path_rate=0.5).train(training)
    images = torch.zeros(2, 3, 32, 32)
    with backend.forced("triton"):
        deit_fast.warmup(model, 2)
        warmed = set(launched)
        launched.clear()
        with torch.set_grad_enabled(training):
            output = model(images)
        if training:
            output.sum().backward()
    assert launched and launched <= warmed


def test_nothing_of_the_model_or_the_generator_changes():
    model = nn.Sequential(distilled(drop_path_rate=0.5), nn.BatchNorm1d(10)).train()
    model[0].cls_token.grad = torch.ones_like(model[0].cls_token)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    deit_fast.warmup(model, 2, 32)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.cls_token"]
    assert torch.equal(model[0].cls_token.grad, torch.ones_like(model[0].cls_token))
    assert model.training


@pytest.mark.parametrize("training", [False, True])
def test_it_may_be_called_in_inference_mode(training):
    model = nn.Sequential(distilled(), nn.BatchNorm1d(10)).train(training)
    before = model[1].running_mean.clone()
    with torch.inference_mode():
        deit_fast.warmup(model, 2, 32)
    assert torch.equal(model[1].running_mean, before)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_autocast_keeps_none_of_the_weights_it_casts():
    """One cast to another dtype would serve the step that follows."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.autocast("cpu", torch.bfloat16):
        deit_fast.warmup(model, 2, 2, amp=torch.float16)
        assert torch.is_autocast_cache_enabled()
        assert model(torch.randn(2, 3, 2, 2)).dtype is torch.bfloat16


def test_the_image_size_is_the_models_own():
    from transformers import DeiTConfig as Config
    from transformers import DeiTForImageClassification

    config = Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, image_size=48)
    for model, size in (
        (distilled(), 32),
        (DeiTForImageClassification(config), 48),
        (VisionTransformer(DeiTConfig(**CONFIG)), 32),
    ):
        seen = []
        model.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].shape))
        deit_fast.warmup(model.eval(), 3)
        assert seen == [(3, 3, size, size)]


def test_the_channels_are_the_models_own():
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    for model in (
        distilled(in_chans=1),
        ViTModel(ViTConfig(**sizes, image_size=32, num_channels=1)),
        VisionTransformer(DeiTConfig(**CONFIG, in_chans=1)),
    ):
        deit_fast.warmup(model.eval(), 2)
    with pytest.raises(ValueError, match=r"\[batch, 1, 32, 32\], got \[2, 4, 32, 32\]"):
        deit_fast.warmup(model, 2, channels=4)


def test_bad_arguments_are_errors():
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        deit_fast.warmup(distilled(), 0)
    with pytest.raises(ValueError, match="pass img_size"):
        deit_fast.warmup(nn.Linear(2, 2), 1)
