"""The twins in timm's registry: timm's models, swapped, by the rules of timm."""

import pytest
import timm
import torch
from timm.task import LogitDistillationTask, TokenDistillationTask
from torch import nn

import deit_fast
import deit_fast.timm

STOCK = timm.list_models(["deit_*", "deit3_*"], module="deit")
SIZES = {"img_size": 32, "embed_dim": 96, "depth": 3, "num_heads": 3, "num_classes": 5}
PRETRAINED = timm.list_models(["deit_*", "deit3_*"], module="deit", pretrained=True)


def pair(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A stock model and its twin with its weights."""
    torch.manual_seed(0)
    stock = timm.create_model(name, **SIZES | options)
    twin = timm.create_model(deit_fast.timm.PREFIX + name, **SIZES | options)
    twin.load_state_dict(stock.state_dict())
    return stock.eval(), twin.eval()


def test_every_deit_has_a_twin():
    assert STOCK and {deit_fast.timm.PREFIX + name for name in STOCK} == set(timm.list_models("deit_fast_*"))
    assert set(deit_fast.timm.__all__) == set(timm.list_models("deit_fast_*"))
    assert all(callable(getattr(deit_fast.timm, name)) for name in deit_fast.timm.__all__)


def test_a_twin_has_the_pretrained_configurations_of_its_model():
    assert timm.list_models("deit_fast_*", pretrained=True) == [deit_fast.timm.PREFIX + name for name in PRETRAINED]
    for name in [*STOCK, *PRETRAINED]:
        stock, twin = (timm.get_pretrained_cfg(prefix + name).to_dict() for prefix in ("", deit_fast.timm.PREFIX))
        assert twin.pop("architecture") == deit_fast.timm.PREFIX + stock.pop("architecture")
        assert twin == stock


@pytest.mark.parametrize("name", STOCK)
def test_a_twin_is_swapped_and_answers_as_its_model(name):
    stock, twin = pair(name, img_size=28 if "patch14" in name else 32)
    images = torch.randn(2, 3, stock.patch_embed.img_size[0], stock.patch_embed.img_size[1])
    with torch.no_grad():
        torch.testing.assert_close(twin(images), stock(images), rtol=0, atol=2e-5)
    report = deit_fast.report(twin)
    assert report.calls[""].fused == 1 and not report.stock
    assert twin.pretrained_cfg == stock.pretrained_cfg


def test_a_tag_and_timms_options_reach_the_model():
    tagged = timm.create_model("deit_fast_deit3_small_patch16_224.fb_in22k_ft_in1k", drop_path_rate=0.3, **SIZES)
    assert tagged.pretrained_cfg["tag"] == "fb_in22k_ft_in1k"
    assert tagged.blocks[2].drop_path1.drop_prob == pytest.approx(0.3)


NAME = "deit_tiny_distilled_patch16_224"
USES = {
    "forward_features": lambda model, x: model.forward_features(x),
    "forward_head of features": lambda model, x: model.forward_head(model.forward_features(x), pre_logits=True),
    "forward_intermediates": lambda model, x: model.forward_intermediates(x, indices=2, norm=True),
    "intermediates_only": lambda model, x: model.forward_intermediates(x, intermediates_only=True, output_fmt="NLC"),
    "get_intermediate_layers": lambda model, x: model.get_intermediate_layers(x, n=2, return_prefix_tokens=True),
    "reset_classifier": lambda model, x: (model.reset_classifier(0), model(x))[1],
    "distilled training": lambda model, x: (model.train(), model.set_distilled_training(True), model(x))[2],
    "grad checkpointing": lambda model, x: (model.train(), model.set_grad_checkpointing(), model(x))[2],
    "prune_intermediate_layers": lambda model, x: (model.prune_intermediate_layers(1), model.forward_features(x))[1],
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_each_way_to_use_a_timm_model_gives_its_numbers(use):
    stock, twin = pair(NAME)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(USES[use](twin, images), USES[use](stock, images), rtol=0, atol=5e-5)
    assert sum(calls.fused for calls in deit_fast.report(twin).calls.values())


@pytest.mark.parametrize(
    ("options", "size"), [({"dynamic_img_size": True}, 48), ({"num_classes": 0}, 32), ({"in_chans": 1}, 32)]
)
def test_each_option_of_a_timm_model_gives_its_numbers(options, size):
    stock, twin = pair(NAME, **options)
    images = torch.randn(2, options.get("in_chans", 3), size, size)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), stock(images), rtol=0, atol=2e-5)
    assert deit_fast.report(twin).calls["blocks.0"].fused == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_timms_feature_extraction_takes_a_twin(dynamic):
    nodes = {"blocks.1": "middle", "head": "head"}
    stock, twin = (
        timm.models.create_feature_extractor(model, nodes)
        # fx can't trace stock's distilled model at dynamic sizes.
        for model in pair("deit_tiny_patch16_224", dynamic_img_size=dynamic)
    )
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(twin(images), stock(images), rtol=0, atol=2e-5)


def _step(task: nn.Module) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(1)
    loss = task.train()(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))["loss"]
    loss.backward()
    return loss.detach(), [p.grad for p in task.trainable_module.parameters()]


@pytest.mark.parametrize("kind", ["soft", "hard", "logits"])
@pytest.mark.parametrize("compiled", [False, True])
def test_timms_distillation_tasks_run_on_swapped_students_and_teachers(kind, compiled):
    results = []
    students, teachers = pair(NAME, drop_path_rate=0.2), pair("deit3_small_patch16_224")
    for student, teacher in zip(students, teachers, strict=True):
        if kind == "logits":
            task = LogitDistillationTask(student, teacher, criterion=nn.CrossEntropyLoss(), verbose=False)
        else:
            task = TokenDistillationTask(
                student, teacher, criterion=nn.CrossEntropyLoss(), distill_type=kind, verbose=False
            )
        if compiled:
            task.compile(backend="aot_eager")
        results.append(_step(task))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=5e-5)
    if not compiled:
        assert all(deit_fast.report(model).calls["blocks.0"].fused == 1 for model in (students[1], teachers[1]))
