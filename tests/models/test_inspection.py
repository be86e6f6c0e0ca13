"""What a checkpoint's tensors and its folder tell of its model."""

import json
from dataclasses import replace

import pytest
import torch

from deit_fast.models import VisionTransformer, list_models
from deit_fast.models.checkpoint import load_checkpoint
from deit_fast.models.inspection import inspect, known_as
from deit_fast.models.registry import get_config


@pytest.fixture
def saved(tmp_path):
    """`saved(config)`: a file that says nothing but its tensors."""

    def save(config):
        torch.save(VisionTransformer(config).state_dict(), tmp_path / "x.pth")
        return load_checkpoint(tmp_path / "x.pth")

    return save


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_base_distilled_patch16_384", "deit3_huge_patch14_224"])
def test_tensors_tell_all_but_the_heads(name, small_config, saved):
    config = small_config(name, depth=1, in_chans=1, num_classes=0)
    found, tensors, assumed = inspect(saved(config), num_heads=config.num_heads)
    assert found == config and tensors.keys() == VisionTransformer(config, device="meta").state_dict().keys()
    assert assumed == []


def test_heads_that_nobody_tells_are_those_of_the_known_model_or_of_64_and_that_is_said(small_config, saved):
    huge = get_config("deit3_huge_patch14_224")
    thin = VisionTransformer(replace(huge, img_size=14, num_classes=0), device="meta")
    checkpoint = load_checkpoint(saved(small_config("deit_tiny_patch16_224")).path)
    found, _, assumed = inspect(checkpoint)
    assert found.num_heads == 3
    assert assumed == ["3 attention heads, one for every 64 of the width 192: the checkpoint doesn't say how many"]
    found, _, assumed = inspect(checkpoint._replace(state_dict=thin.state_dict()))
    assert found.num_heads == 16 and "as the known models of this size have" in assumed[0]
    with pytest.raises(ValueError, match="its width 48 is no multiple of 64: give their number"):
        inspect(saved(small_config("deit_tiny_patch16_224", embed_dim=48)))


@pytest.mark.parametrize("arguments", [{"num_heads": 6}, {}])
def test_a_folder_of_timm_tells_heads_and_image(arguments, small_config, saved):
    config = {"architecture": "deit_tiny_patch16_224", "model_args": {"img_size": [64, 32], **arguments}}
    checkpoint = saved(small_config("deit_tiny_patch16_224", img_size=(64, 32)))._replace(config=config)
    found, _, assumed = inspect(checkpoint)
    assert (found.num_heads, found.img_size, assumed) == (arguments.get("num_heads", 3), (64, 32), [])
    with pytest.raises(ValueError, match=f"has {found.num_heads} attention heads by its own words, and 2 are asked"):
        inspect(checkpoint, num_heads=2)


def test_positions_of_no_square_are_refused_where_nobody_tells_the_image(small_config, saved):
    with pytest.raises(ValueError, match="for which images its 6 positions are"):
        inspect(saved(small_config("deit_tiny_patch16_224", img_size=(80, 16), depth=1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_embed.proj.weight": torch.ones(0, 3, 16, 16)}, r"it has no patch_embed\.proj\.weight as DeiTs have"),
        ({"cls_token": torch.ones(192)}, "it has no cls_token as DeiTs have"),
        ({"blocks.123456789.norm1.bias": torch.ones(192)}, r"(?s)missing: blocks\.2\..*unexpected: blocks\.123456789"),
        ({"head.weight": torch.tensor(1.0)}, r"unexpected: head\.weight, found \(\)"),
        ({"norm.bias": torch.ones(192, dtype=torch.int8)}, r"not floating-point: norm\.bias"),
    ],
)
def test_broken_tensors_are_refused(changes, message, small_config, saved):
    checkpoint = saved(small_config("deit_tiny_patch16_224"))
    with pytest.raises(ValueError, match=message):
        inspect(checkpoint._replace(state_dict=checkpoint.state_dict | changes))


def test_a_hidden_width_may_be_any(small_config, saved):
    checkpoint = saved(small_config("deit_tiny_patch16_224", embed_dim=49, num_heads=1, mlp_ratio=27.1 / 49))
    assert checkpoint.state_dict["blocks.0.mlp.fc1.weight"].shape == (27, 49) and int(27 / 49 * 49) == 26
    assert inspect(checkpoint, num_heads=1)[1].keys() == checkpoint.state_dict.keys()


def test_another_activation_is_refused(transformers_model, tmp_path):
    transformers_model("ViTForImageClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        inspect(load_checkpoint(tmp_path))


def test_a_model_of_timm_that_may_compute_something_else_is_refused(small_config, saved):
    checkpoint = saved(small_config("deit_tiny_patch16_224"))
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"act_layer": "quick_gelu"}}
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 with its own act_layer may compute something else"):
        inspect(checkpoint._replace(config=config))


@pytest.mark.parametrize("name", list_models())
def test_a_known_model_is_known_whatever_its_classes(name):
    assert known_as(replace(get_config(name), num_classes=7, in_chans=1)) == name
    assert known_as(replace(get_config(name), depth=5)) is None
