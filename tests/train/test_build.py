"""What a recipe names is what timm makes of it."""

import copy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.models.conversion import convert
from deit_fast.ops import backend
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


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("chosen", [None, "triton"])
def test_images_in_autocasts_dtype_have_the_bits_of_wide_ones(model, swapped, chosen):
    assert build.images_dtype_of(model, "no") is torch.float32
    assert build.images_dtype_of(timm.create_model("test_resnet"), "bf16") is torch.float32  # it has no patches
    if swapped:
        build.swap_known(model)
    dtype, images, found = build.images_dtype_of(model, "bf16"), torch.randn(2, 3, 16, 16), []
    assert dtype is torch.bfloat16
    for given in (images, images.to(dtype)):
        model.zero_grad()
        with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16):
            logits = model(given)
        logits.float().square().sum().backward()
        found.append([logits, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *found))


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


# -- fine-tuning

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()


@pytest.fixture
def distilled():
    made = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, **SMALL)
    torch.nn.init.normal_(made.dist_token)
    return made.eval()


def finetuned(source, num_classes: int = 3, **given):
    made = recipe.load("finetune", finetune=str(source), input_size=given.pop("input_size", 16), **given)
    return made, build.model_of(made, num_classes, build.weights_of(made)).eval()


@pytest.mark.parametrize("kind", ["timm", "transformers", "original", "safetensors"])
def test_whatever_holds_the_weights_is_begun_with(model, tmp_path, kind):
    folder = saved(model, tmp_path / "saved")
    if kind == "timm":
        source, given = folder, {}
    else:
        source = tmp_path / {"transformers": "there", "original": "there.pth"}.get(kind, "there.safetensors")
        convert(folder, source, "transformers" if kind == "transformers" else "original")
        size = {name: value for name, value in SMALL.items() if name != "img_size"}
        given = {"model": "deit_tiny_patch16_224", "model_kwargs": size}
    _, again = finetuned(source, **given)
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))


def test_heads_of_other_classes_are_new_and_the_rest_is_not(model, tmp_path):
    _, made = finetuned(saved(model, tmp_path / "saved"), num_classes=5)
    assert made(IMAGES).shape == (2, 5)
    assert torch.equal(made.forward_features(IMAGES), model.eval().forward_features(IMAGES))


def test_a_distilled_model_without_a_teacher_has_its_class_head_alone(distilled, tmp_path):
    folder = saved(distilled, tmp_path / "saved")
    _, alone = finetuned(folder)
    assert torch.allclose(alone(IMAGES), distilled.head(distilled.forward_features(IMAGES)[:, 0]), atol=1e-6)
    again = build.pretrained(saved(alone, tmp_path / "again"), num_classes=3)
    assert torch.allclose(again(IMAGES), alone(IMAGES), atol=1e-6)


def test_a_distilled_model_with_a_teacher_has_both_heads(distilled, tmp_path):
    _, both = finetuned(saved(distilled, tmp_path / "saved"), distillation_type="hard")
    assert torch.equal(both(IMAGES), distilled(IMAGES))
    _, new = finetuned(tmp_path / "saved", num_classes=5, distillation_type="hard")
    assert [logits.shape for logits in new.train()(IMAGES)] == [(2, 5)] * 2


def test_what_fills_in_images_may_begin_with_a_classifier(distilled, tmp_path):
    made = recipe.load("pretrain", finetune=saved(distilled, tmp_path / "saved"))
    encoder = build.model_of(made, 3, build.weights_of(made)).eval()
    assert torch.equal(encoder.forward_features(IMAGES), distilled.forward_features(IMAGES))


@pytest.mark.parametrize("distillation_type", ["none", "hard"])
def test_positions_are_interpolated_for_larger_images(distilled, tmp_path, distillation_type):
    made, larger = finetuned(saved(distilled, tmp_path / "saved"), input_size=32, distillation_type=distillation_type)
    expected = resample_abs_pos_embed(distilled.pos_embed, new_size=(4, 4), num_prefix_tokens=2)
    assert torch.equal(larger.pos_embed, expected) and build.data_config_of(made, larger)["input_size"] == (3, 32, 32)


def test_weights_that_do_not_fit_are_refused(model, distilled, tmp_path):
    with pytest.raises(ValueError, match=r"(?s)don't fit the model deit_small_patch16_224: .*pos_embed"):
        convert(saved(model, tmp_path / "saved"), tmp_path / "w.pth", "original")
        finetuned(tmp_path / "w.pth")
    with pytest.raises(ValueError, match="has one head; distillation needs"):
        finetuned(tmp_path / "saved", distillation_type="hard")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at nowhere\.pth"):
        finetuned("nowhere.pth")


def test_layer_decay_gives_each_block_a_share_of_the_rate_of_the_next(model):
    made = recipe.load("finetune", layer_decay=0.5)
    groups = build.optimizer_of(made, model, 1).param_groups
    rates = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    layers = (model.patch_embed.proj.weight, *(block.attn.qkv.weight for block in model.blocks), model.head.weight)
    assert [rates[id(weight)] for weight in layers] == [0.125, 0.25, 0.5, 1.0]


@pytest.mark.parametrize("distillation_type", ["none", "hard"])
def test_a_linear_probe_keeps_nothing_of_its_backbone(distilled, tmp_path, distillation_type):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"distillation_type: {distillation_type}\ndrop_path: 0.5\nlinear_probe: true\n")
    made = recipe.load(str(path), finetune=saved(distilled, tmp_path / "saved"))
    model = build.model_of(made, 3, build.weights_of(made)).eval()
    plain = model(IMAGES)
    build.swap_known(model)
    build.trained_of(made, model)
    heads = 2 if distillation_type == "hard" else 1
    assert len([name for name, parameter in model.named_parameters() if parameter.requires_grad]) == 2 * heads
    model.train()
    build.rest_backbone(model)
    # The heads' inputs alone: two rows, or a view of the last norm's six.
    assert saved_bytes(model, lambda: model(IMAGES)) <= (2 if heads == 2 else 6) * len(IMAGES) * SMALL["embed_dim"] * 4
    outputs = model(IMAGES)
    logits = (outputs[0] + outputs[1]) / 2 if heads == 2 else outputs
    assert torch.allclose(logits, plain, atol=1e-6)  # no drop path
    optimizer = build.optimizer_of(made, model, 1)
    logits.square().sum().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    assert len(optimizer.state) == 2 * heads
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.startswith("head")}
