"""What a recipe names is what timm makes of it."""

import pytest
import timm
import torch

from deit_fast.swap.core import report
from deit_fast.train import build, recipe
from deit_fast.train.distillation import DistillationLoss

SMALL = {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 1, "img_size": 16}


@pytest.fixture
def model():
    return timm.create_model("deit_tiny_patch16_224", num_classes=3, **SMALL)


def saved(model, folder) -> str:
    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    return str(folder)


@pytest.mark.parametrize(("given", "lr"), [({}, 2.5e-4), ({"unscale_lr": True}, 5e-4)])
def test_the_learning_rate_is_for_a_batch_of_512(model, given, lr):
    optimizer = build.optimizer_of(recipe.load(**given), model, batch_size=256)
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]
    assert {group["lr"] for group in optimizer.param_groups} == {lr}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.05]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "SoftTargetCrossEntropy"),
        ({"mixup": 0, "cutmix": 0}, "LabelSmoothingCrossEntropy"),
        ({"mixup": 0, "cutmix": 0, "smoothing": 0}, "CrossEntropyLoss"),
        ({"bce_loss": True}, "BinaryCrossEntropy"),
    ],
    ids=str,
)
def test_the_loss_is_that_of_the_original_script(given, name):
    loss = build.loss_of(recipe.load(**given), None)
    assert isinstance(loss, DistillationLoss) and type(loss.base_criterion).__name__ == name


def test_binary_cross_entropy_takes_each_mixed_class_as_a_full_one():
    loss = build.loss_of(recipe.load("deit3"), None)
    logits = torch.randn(2, 3)
    mixed, full = torch.tensor([[0.2, 0.8, 0.0]] * 2), torch.tensor([[1.0, 1.0, 0.0]] * 2)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, full)
    assert torch.allclose(loss(logits, logits, mixed), expected)


def test_the_teacher_gets_images_as_it_knows_them(tmp_path):
    made = timm.create_model("test_resnet", num_classes=10)
    model = build.pretrained(saved(made, tmp_path / "teacher"), num_classes=10)
    teacher = build.Teacher(model, {"mean": (0.4,) * 3, "std": (0.25,) * 3})
    images = torch.rand(2, 3, 32, 32)
    logits = teacher((images - 0.4) / 0.25)
    assert torch.allclose(logits, model((images - 0.5) / 0.5), atol=1e-5)
    assert not logits.requires_grad and not logits.is_inference() and not teacher.training and teacher.seconds > 0


def test_a_saved_vit_comes_back_swapped(model, tmp_path):
    again = build.pretrained(saved(model, tmp_path / "vit"), num_classes=3)
    images = torch.rand(1, 3, 16, 16)
    assert torch.allclose(again(images), model.eval()(images), atol=1e-6) and "Block" in str(report(again))


def test_what_can_not_be_loaded_is_named(model, tmp_path):
    with pytest.raises(ValueError, match="can't load resnet_of_nobody"):
        build.pretrained("resnet_of_nobody", 10)
    with pytest.raises(ValueError, match="knows 3 classes, the images have 10"):
        build.pretrained(saved(model, tmp_path / "vit"), 10)
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        build.pretrained(str(tmp_path / "vit"), 3)
