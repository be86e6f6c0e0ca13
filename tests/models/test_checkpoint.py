import argparse
import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_fast.models import DeiTConfig, VisionTransformer, create_model
from deit_fast.models.checkpoint import follow_config, load_checkpoint, load_weights
from deit_fast.models.description import to_metadata
from deit_fast.models.inspection import inspect
from deit_fast.models.key_maps import to_timm_names

TINY, DISTILLED = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


@pytest.fixture
def load(small_config):
    """`load(path, name, **changes)`: what create_model does with a checkpoint, at the small size."""

    def _load(path, name=TINY, **changes):
        checkpoint = load_checkpoint(path)
        model = VisionTransformer(follow_config(small_config(name, **changes), checkpoint), device="meta")
        load_weights(model, checkpoint, torch.device("cpu"))
        return model.eval()

    return _load


def assert_same_logits(model, stock, images):
    with torch.inference_mode():
        expected = stock(images)
        expected = getattr(expected, "logits", expected)
        tolerance = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=tolerance)


def to_original_names(state_dict):
    """DeiT III's LayerScale as the original repository calls it."""
    return {re.sub(r"\.ls([12])\.gamma", r".gamma_\1", key): value for key, value in state_dict.items()}


def save_in_memory_names(model, folder):
    """A transformers folder with the names of the modules of today, which save_pretrained doesn't write."""
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors")


# Files and names


@pytest.mark.parametrize("name", [TINY, DISTILLED, "deit3_small_patch16_224"])
@pytest.mark.parametrize("file", ["x.safetensors", "x.pth", "x.pt", "x.bin"])
def test_timm_state_dicts_load_from_every_kind_of_file(name, file, tmp_path, load, timm_model, images):
    stock = timm_model(name)
    save = save_file if file.endswith(".safetensors") else torch.save
    save(stock.state_dict(), tmp_path / file)
    assert_same_logits(load(tmp_path / file, name), stock, images)


@pytest.mark.parametrize("name", [DISTILLED, "deit3_small_patch16_224"])
def test_checkpoints_of_the_original_repository_load(name, tmp_path, load, timm_model, images):
    stock = timm_model(name)
    path = tmp_path / "x.pth"
    args = argparse.Namespace(lr=5e-4, model=name)
    torch.save({"model": to_original_names(stock.state_dict()), "epoch": 299, "args": args}, path)
    assert_same_logits(load(path, name), stock, images)


def test_training_checkpoints_of_timm_load(tmp_path, load, timm_model, images):
    stock = timm_model(TINY)
    content = {
        "epoch": 3,
        "arch": TINY,
        "state_dict": stock.state_dict(),
        "args": argparse.Namespace(opt="adamw"),
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert_same_logits(load(tmp_path / "x.pth"), stock, images)


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("keys", [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("state_dict", None)])
def test_averaged_weights_are_taken_where_timm_takes_them_and_that_is_said(keys, use_ema, tmp_path, timm_model):
    helpers = pytest.importorskip("timm.models")
    plain = timm_model(TINY).state_dict()
    averaged = {f"module.{name}": 2 * tensor for name, tensor in plain.items()}
    path = tmp_path / "model_best.pth.tar"  # timm's own name
    torch.save({keys[0]: plain, keys[1] or "model_ema": averaged if keys[1] else None, "epoch": 3}, path)
    expected = helpers.load_state_dict(str(path), use_ema=use_ema)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        entries = to_timm_names(load_checkpoint(path, use_ema).state_dict)
    assert {name: entry.tensor.sum() for name, entry in entries.items()} == {k: v.sum() for k, v in expected.items()}
    assert [str(each.message).partition("; ")[2] for each in said] == (
        ["use_ema=False takes the others"] if use_ema and keys[1] else []
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_the_names_of_wrapped_models_are_timms_after_its_cleaning(prefix, tmp_path, load, timm_model, images):
    helpers = pytest.importorskip("timm.models")
    stock = timm_model(DISTILLED)
    wrapped = {prefix + name: tensor for name, tensor in stock.state_dict().items()}
    torch.save(wrapped, tmp_path / "x.pth")
    assert list(to_timm_names(wrapped)) == list(helpers.load_state_dict(str(tmp_path / "x.pth")))
    assert_same_logits(load(tmp_path / "x.pth", DISTILLED), stock, images)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.model.", "model._orig_mod."])
def test_the_checkpoint_of_a_lightning_module_loads(prefix, tmp_path, load, timm_model, images):
    stock = timm_model(TINY)
    state_dict = {prefix + name: tensor for name, tensor in stock.state_dict().items()}
    torch.save({"epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": state_dict}, tmp_path / "last.ckpt")
    assert_same_logits(load(tmp_path / "last.ckpt"), stock, images)
    torch.save({"state_dict": state_dict | {"criterion.weight": torch.ones(10)}}, tmp_path / "more.ckpt")
    with pytest.raises(ValueError, match=r"unexpected: criterion\.weight"):
        load(tmp_path / "more.ckpt")


@pytest.mark.parametrize("save", ["save_pretrained", "in_memory_names", "sharded", "pickle", "sharded_pickle"])
@pytest.mark.parametrize(
    ("class_name", "name"),
    [("ViTForImageClassification", TINY), ("DeiTForImageClassificationWithTeacher", DISTILLED)],
)
def test_transformers_folders_load(class_name, name, save, tmp_path, load, transformers_model, images):
    stock = transformers_model(class_name)
    if save == "in_memory_names":
        save_in_memory_names(stock, tmp_path)
    else:
        stock.save_pretrained(tmp_path, max_shard_size="1MB" if "sharded" in save else "1GB")
    if "pickle" in save:
        safetensors_to_pickle(tmp_path)
    if "sharded" in save:
        assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert_same_logits(load(tmp_path, name), stock, images)


def safetensors_to_pickle(folder):
    """The same folder as transformers wrote it before safetensors."""
    for file in folder.glob("*.safetensors"):
        torch.save(
            load_file(file),
            folder / file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin"),
        )
        file.unlink()
    for index in folder.glob("*.index.json"):
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("class_name", ["ViTModel", "DeiTModel"])
def test_a_base_model_of_transformers_gives_its_features(class_name, tmp_path, load, transformers_model, images):
    stock = transformers_model(class_name)
    stock.save_pretrained(tmp_path)
    name = DISTILLED if class_name == "DeiTModel" else TINY
    model = load(tmp_path, name, num_classes=0)
    with torch.inference_mode():
        expected = stock(images).last_hidden_state
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4)


def test_a_transformers_folder_sets_the_epsilon(tmp_path, load, transformers_model):
    transformers_model("ViTForImageClassification", layer_norm_eps=1e-3).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert {m.eps for m in model.modules() if hasattr(m, "eps")} == {1e-3}


def test_a_timm_folder_loads(tmp_path, load, timm_model, images):
    stock = timm_model(TINY)
    save_file(stock.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": TINY, "num_classes": 10}))
    assert_same_logits(load(tmp_path), stock, images)


def test_create_model_takes_a_checkpoint(tmp_path):
    torch.manual_seed(0)
    source = create_model(DISTILLED, num_classes=10, img_size=64).eval()
    save_file(source.state_dict(), tmp_path / "x.safetensors")
    model = create_model(
        DISTILLED, num_classes=10, img_size=64, drop_path_rate=0.1, checkpoint=str(tmp_path / "x.safetensors")
    ).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(images), source(images))
    assert all(parameter.requires_grad for parameter in model.parameters())

    half = create_model(
        DISTILLED, num_classes=10, img_size=64, checkpoint=tmp_path / "x.safetensors", dtype=torch.bfloat16
    )
    for key, value in half.state_dict().items():
        assert torch.equal(value, source.state_dict()[key].bfloat16()), key


# Another image size, another head


@pytest.mark.parametrize("name", [TINY, DISTILLED, "deit3_small_patch16_224"])
@pytest.mark.parametrize("size", [32, 96])
def test_positions_of_another_grid_are_interpolated_as_timm_does(name, size, tmp_path, load, timm_model):
    stock = timm_model(name)
    torch.save(stock.state_dict(), tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", name, img_size=size)
    stock.set_input_size(size)
    assert torch.equal(model.pos_embed, stock.pos_embed)
    assert_same_logits(model, stock, torch.randn(1, 3, size, size))


def test_another_number_of_classes_is_an_error_that_says_what_to_pass(tmp_path, load, timm_model):
    save_file(timm_model(DISTILLED).state_dict(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "x.safetensors", DISTILLED, num_classes=1000)
    assert str(error.value).splitlines()[1:] == [
        "  misshapen: head.bias, expected (1000,), found (10,)",
        "  misshapen: head.weight, expected (1000, 192), found (10, 192)",
        "  misshapen: head_dist.bias, expected (1000,), found (10,)",
        "  misshapen: head_dist.weight, expected (1000, 192), found (10, 192)",
        "Its head has 10 classes, the model 1000: pass num_classes=10, num_classes=1000 for new heads, "
        "or num_classes=0 for none",
    ]


@pytest.mark.parametrize("classes", [7, 1000])
def test_a_given_number_of_classes_starts_new_heads_and_says_so(classes, tmp_path, timm_model):
    stock = timm_model(DISTILLED, depth=12)
    path = tmp_path / "x.pth"
    torch.save(stock.state_dict(), path)
    with pytest.warns(UserWarning, match=rf"x\.pth: heads of 10 classes are left out; .* of {classes} classes"):
        model = create_model(DISTILLED, num_classes=classes, img_size=64, checkpoint=path)
    expected = stock.state_dict()
    for name, tensor in model.state_dict().items():
        if not name.startswith("head"):
            assert torch.equal(tensor, expected[name]), name
    for head in model.get_classifier():
        assert head.weight.shape == (classes, 192) and not head.bias.any()
        assert head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [logits.shape for logits in model.train()(torch.zeros(1, 3, 64, 64))] == [(1, classes)] * 2


def test_a_checkpoint_without_heads_gets_new_ones_where_a_number_is_given(tmp_path, transformers_model):
    transformers_model("DeiTModel", num_hidden_layers=12).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="It has no head: pass num_classes=1000 for new heads, or num_classes=0"):
        create_model(DISTILLED, img_size=64, checkpoint=tmp_path)
    with pytest.warns(UserWarning, match="has no heads; the model's, of 5 classes, start at random"):
        model = create_model(DISTILLED, num_classes=5, img_size=64, checkpoint=tmp_path)
    assert [head.out_features for head in model.get_classifier()] == [5, 5]


def test_one_classifier_of_other_classes_makes_room_for_two_new_heads(tmp_path, transformers_model):
    transformers_model("DeiTForImageClassification", num_hidden_layers=12).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="heads of 10 classes are left out"):
        create_model(DISTILLED, num_classes=5, img_size=64, checkpoint=tmp_path)
    # Beside a head that is trained, one at random would spoil the mean of both.
    with pytest.raises(ValueError, match=r"missing: head_dist\.weight"):
        create_model(DISTILLED, num_classes=10, img_size=64, checkpoint=tmp_path)


@pytest.mark.parametrize("name", [TINY, DISTILLED, "deit3_small_patch16_224"])
@pytest.mark.parametrize("change", [{"img_size": (48, 80)}, {"img_size": (96, 32)}, {"in_chans": 1}, {"in_chans": 5}])
def test_other_images_adapt_a_checkpoint_as_timm_does(name, change, tmp_path, timm_model):
    timm = pytest.importorskip("timm")
    torch.save(timm_model(name, depth=12).state_dict(), tmp_path / "x.pth")
    change = {"img_size": 64, "num_classes": 10} | change
    source = {"file": str(tmp_path / "x.pth"), "num_classes": 10, "input_size": (3, 64, 64)}
    stock = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, **change).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the heads fit
        model = create_model(name, checkpoint=tmp_path / "x.pth", **change).eval()
    for key, tensor in stock.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert_same_logits(model, stock, torch.randn(2, *model.config.input_size))


def test_as_many_positions_are_kept_and_that_is_said(tmp_path, load, timm_model):
    stock = timm_model(TINY)
    torch.save(stock.state_dict(), tmp_path / "x.pth")
    with pytest.warns(UserWarning, match=r"x\.pth doesn't say .* its 16 positions .* \(128, 32\) .* of 4 x 4 patches"):
        model = load(tmp_path / "x.pth", img_size=(128, 32))
    assert torch.equal(model.pos_embed, stock.pos_embed)


def test_a_folder_says_which_grid_its_positions_have(tmp_path, load, transformers_model):
    layers = pytest.importorskip("timm.layers")
    stock = transformers_model("ViTForImageClassification", image_size=[128, 32])
    stock.save_pretrained(tmp_path)
    positions = stock.vit.embeddings.position_embeddings
    for img_size, grid in (((128, 32), [8, 2]), (64, [4, 4]), (32, [2, 2])):
        expected = layers.resample_abs_pos_embed(positions, grid, [8, 2])
        assert torch.equal(load(tmp_path, img_size=img_size).pos_embed, expected)


def test_a_file_that_describes_its_model_says_which_grid_its_positions_have(tmp_path, load, timm_model):
    layers = pytest.importorskip("timm.layers")
    stock = timm_model(TINY, img_size=(128, 32))
    described = DeiTConfig(embed_dim=192, depth=2, num_heads=3, img_size=(128, 32), num_classes=10)
    save_file(stock.state_dict(), tmp_path / "x.safetensors", metadata=to_metadata(described))
    expected = layers.resample_abs_pos_embed(stock.pos_embed, [4, 4], [8, 2])
    assert torch.equal(load(tmp_path / "x.safetensors").pos_embed, expected)


def test_channels_adapt_where_a_number_is_given_and_are_an_error_where_not(tmp_path, timm_model):
    stock, path = timm_model(TINY, depth=12, in_chans=1), tmp_path / "x.pth"
    torch.save(stock.state_dict(), path)
    with pytest.raises(ValueError, match=r"misshapen: patch_embed\.proj\.weight, expected \(192, 3, 16, 16\)"):
        create_model(TINY, num_classes=10, img_size=64, checkpoint=path)
    model = create_model(TINY, num_classes=10, img_size=64, in_chans=3, checkpoint=path).eval()
    grey = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(model(grey.expand(-1, 3, -1, -1)), stock(grey), rtol=1e-4, atol=1e-4)


def test_no_classes_leaves_the_heads_of_the_checkpoint_out(tmp_path, load, timm_model, images):
    stock = timm_model(DISTILLED)
    torch.save(stock.state_dict(), tmp_path / "x.pth")
    model = load(tmp_path / "x.pth", DISTILLED, num_classes=0)
    with torch.inference_mode():
        expected = stock.forward_features(images)[:, :2].mean(dim=1)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


# Checkpoints that don't fit


def test_missing_unexpected_and_misshapen_keys_are_one_error_that_lists_them_all(tmp_path, load, timm_model):
    state_dict = timm_model(TINY).state_dict()
    del state_dict["norm.weight"], state_dict["blocks.1.mlp.fc1.bias"]
    state_dict["blocks.0.attn.q_norm.weight"] = torch.ones(64)
    state_dict["blocks.0.norm1.weight"] = torch.ones(7)
    state_dict["cls_token"] = torch.ones(1, 1, 192, dtype=torch.int8)
    path = tmp_path / "x.pth"
    torch.save(state_dict, path)
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).splitlines() == [
        f"{path} doesn't fit the model:",
        "  missing: blocks.1.mlp.fc1.bias, expected (768,)",
        "  missing: norm.weight, expected (192,)",
        "  unexpected: blocks.0.attn.q_norm.weight, found (64,)",
        "  misshapen: blocks.0.norm1.weight, expected (192,), found (7,)",
        "  not floating-point: cls_token, found torch.int8",
    ]


@pytest.mark.parametrize(
    ("made_as", "loaded_as", "expected"),
    [
        (DISTILLED, TINY, ["unexpected: dist_token", "unexpected: head_dist.weight", "misshapen: pos_embed"]),
        (TINY, DISTILLED, ["missing: dist_token", "missing: head_dist.weight", "misshapen: pos_embed"]),
        (
            "deit3_small_patch16_224",
            "deit_small_patch16_224",
            ["unexpected: blocks.0.ls1.gamma", "misshapen: pos_embed"],
        ),
        (
            "deit_small_patch16_224",
            "deit3_small_patch16_224",
            ["missing: blocks.0.ls1.gamma", "misshapen: pos_embed"],
        ),
    ],
)
def test_a_checkpoint_of_another_model_does_not_load(made_as, loaded_as, expected, tmp_path, load, timm_model):
    torch.save(timm_model(made_as).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "x.pth", loaded_as)
    for line in expected:
        assert line in str(error.value)


def test_errors_name_the_keys_of_a_transformers_folder_as_the_file_does(tmp_path, load, transformers_model):
    stock = transformers_model("ViTForImageClassification")
    stock.save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    prefix = "vit.encoder.layer.0.attention."
    del state_dict[prefix + "attention.key.bias"]
    state_dict[prefix + "attention.value.weight"] = torch.ones(192, 191)
    state_dict[prefix + "output.dense.weight"] = torch.ones(192, 191)
    state_dict["vit.embeddings.mask_token"] = torch.ones(1, 1, 192)
    save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert set(str(error.value).splitlines()[1:]) == {
        "  missing: blocks.0.attn.qkv.bias, expected (576,)",
        "  missing: blocks.0.attn.qkv.weight, expected (576, 192)",
        f"  unexpected: {prefix}attention.query.bias, found (192,)",
        f"  unexpected: {prefix}attention.value.bias, found (192,)",
        f"  unexpected: {prefix}attention.query.weight, found (192, 192)",
        f"  unexpected: {prefix}attention.key.weight, found (192, 192)",
        f"  unexpected: {prefix}attention.value.weight, found (192, 191)",
        "  unexpected: vit.embeddings.mask_token, found (1, 1, 192)",
        f"  misshapen: {prefix}output.dense.weight, expected (192, 192), found (192, 191)",
    }


def test_the_second_claim_to_a_name_is_unexpected(tmp_path, load, transformers_model):
    transformers_model("ViTForImageClassification").save_pretrained(tmp_path)
    state_dict = load_file(tmp_path / "model.safetensors")
    state_dict["cls_classifier.weight"] = torch.ones(10, 192)
    save_file(state_dict, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: \w*classifier.weight, found"):
        load(tmp_path)


def test_a_folder_of_a_model_computed_otherwise_is_an_error(tmp_path, load, transformers_model):
    transformers_model("ViTForImageClassification", num_attention_heads=6, hidden_act="relu").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_attention_heads is 6, expected 3; hidden_act is 'relu', expected 'gelu'"):
        load(tmp_path)


# Files that can't be read


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it_ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_more_than_weights_is_an_error_and_runs_nothing(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "extra": RunsCode()}, "x.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"x.pth holds more than weights: its pickle asks for posix.mkdir"):
        load_checkpoint("x.pth")
    assert not (tmp_path / "it_ran").exists()


def test_a_whole_pickled_module_is_an_error(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"asks for torch.nn.modules.linear.Linear"):
        load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("file", ["x.safetensors", "x.pth", "old.pth"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_one_clear_error(file, kept, tmp_path):
    path = tmp_path / file
    state_dict = {"weight": torch.randn(100, 100)}
    if file == "x.safetensors":
        save_file(state_dict, path)
    else:
        torch.save(state_dict, path, _use_new_zipfile_serialization=file == "x.pth")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"{file} is no readable .*: truncated, or another kind of file"):
        load_checkpoint(path)


@pytest.mark.parametrize("file", ["x.safetensors", "x.pth"])
@pytest.mark.parametrize("content", [b"hello world", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04", b'{"a": 1}'])
def test_a_foreign_file_is_one_clear_error(file, content, tmp_path):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is no readable .*: truncated, or another kind of file"):
        load_checkpoint(tmp_path / file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({"epoch": 3, "net": {}}, "these are no tensors: epoch, net"),
        ({3: torch.ones(1)}, "these are no tensors: 3"),
    ],
)
def test_a_file_without_a_state_dict_is_an_error(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "x.pth")


def test_an_absent_file_and_another_suffix_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*x.pth"):
        load_checkpoint(tmp_path / "x.pth")
    (tmp_path / "x.npz").touch()
    with pytest.raises(ValueError, match=r"x.npz is no checkpoint: expected a file in .safetensors, .pth"):
        load_checkpoint(tmp_path / "x.npz")


def test_incomplete_folders_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no weights; looked for model.safetensors"):
        load_checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"lacks shards .*: one.safetensors, two.safetensors"):
        load_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        load_checkpoint(tmp_path)
    index.write_text('{"weight_map": {"a": "one')
    with pytest.raises(ValueError, match=r"index.json is no JSON: truncated"):
        load_checkpoint(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_is_not_loaded_onto_the_meta_device(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="can't be loaded on the meta device"):
        create_model(TINY, checkpoint=tmp_path / "x.safetensors", device="meta")


# TensorFlow


def test_a_tensorflow_folder_is_read_and_its_model_computes_the_same():
    pytest.importorskip("h5py")
    folder = Path(__file__).parents[1] / "keras/data/TFDeiTForImageClassificationWithTeacher"
    reference = np.load(folder / "outputs.npz")
    config, tensors, _ = inspect(load_checkpoint(folder))
    model = VisionTransformer(config)
    model.load_state_dict(tensors)
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(reference["given_pixel_values"]))
    torch.testing.assert_close(logits, torch.tensor(reference["logits"]), rtol=0, atol=1e-4)


def test_an_h5_file_that_is_none_is_an_error(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "x.h5").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"x\.h5 is no readable h5 file of weights"):
        load_checkpoint(tmp_path / "x.h5")


def of_external_storage(file, folder):
    (folder / "secret").write_bytes(bytes(16))
    file.create_dataset("a", (4,), "f4", external=[(str(folder / "secret"), 0, 16)])


def virtual(file, folder):
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "other.h5", "w") as other:
        other["a"] = np.ones(4, np.float32)
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource(folder / "other.h5", "a", (4,))
    file.create_virtual_dataset("a", layout)


def never_written(file, folder):
    file.create_dataset("a", (2**50,), "f4", chunks=(2**20,))


def compressed_far(file, folder):
    file.create_dataset("a", data=np.zeros(10**6, np.float32), compression="gzip")


def of_text(file, folder):
    file["a"] = "text"


def of_a_foreign_byte_order(file, folder):
    file["a"] = np.ones(4, ">f4")


@pytest.mark.parametrize(
    "content", [of_external_storage, virtual, never_written, compressed_far, of_text, of_a_foreign_byte_order]
)
def test_an_h5_file_of_other_than_its_own_plain_numbers_is_an_error(content, tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["b"] = np.ones(4, np.float32)
        content(file, tmp_path)
    with pytest.raises(ValueError, match=r"x\.h5 is no readable h5 file of weights"):
        load_checkpoint(tmp_path / "x.h5")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("shard", ["../outside.bin", "/outside.bin", "..", "", "a\\b.bin", "C:b.bin", "sub/a.bin"])
def test_a_shard_outside_the_folder_is_refused(suffix, shard, tmp_path):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    (tmp_path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lists shards that are no plain file names"):
        load_checkpoint(tmp_path)
