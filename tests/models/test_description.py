"""Checkpoints that say which model they hold."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import deit_fast
from deit_fast import create_model
from deit_fast.models import DeiTConfig, VisionTransformer, load_model
from deit_fast.models.description import read_description, to_metadata
from deit_fast.nn import options

CONFIG = DeiTConfig(embed_dim=64, depth=1, num_heads=2, img_size=16, patch_size=4, num_classes=3, distilled=True)


@pytest.fixture
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(CONFIG).eval()


@pytest.fixture
def path(model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path, metadata=to_metadata(CONFIG, {"size": 16}))
    return path


def test_a_described_model_comes_back(model, path):
    assert read_description(path) == (CONFIG, {"size": 16})
    loaded = load_model(path).eval()
    assert loaded.config == CONFIG
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(images), model(images))
    assert next(load_model(path, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_it_takes_the_options_of_swap(path):
    loaded = load_model(path, memory="low", readout=False, compact_drop_path=True)
    assert {options.memory_of(block) for block in loaded.blocks} == {"low"}
    assert not options.readout_wanted(loaded) and options.compact(loaded)
    with pytest.raises(ValueError, match="memory must be one of"):
        load_model(path, memory="high")


def test_a_model_of_images_that_are_no_squares_comes_back(tmp_path):
    config = replace(CONFIG, img_size=(16, 8), in_chans=1)
    model = VisionTransformer(config).eval()
    save_file(model.state_dict(), tmp_path / "wide.safetensors", metadata=to_metadata(config))
    loaded = load_model(tmp_path / "wide.safetensors").eval()
    assert loaded.config == config
    images = torch.randn(2, 1, 16, 8)
    assert torch.equal(loaded(images), model(images))


def test_a_checkpoint_that_says_nothing_is_known_by_its_size(tmp_path):
    model = deit_fast.create_model("deit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save({"model": model.state_dict()}, tmp_path / "tiny.pth")
    with pytest.warns(UserWarning, match="tiny.pth: taken to have 3 attention heads, as the known models of this size"):
        loaded = load_model(tmp_path / "tiny.pth")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_other_checkpoints_are_not_described(model, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(model.state_dict(), path, metadata={"format": "pt"})
    assert read_description(path) is None
    assert read_description(tmp_path) is None
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert read_description(tmp_path / "model.pth") is None
    with pytest.raises(ValueError, match=r"other\.safetensors doesn't say which model .* create_model"):
        load_model(path)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({"config": {"depth": 1}, "image_processor": None}),
        json.dumps({"config": {"depth": 1, "embed_dim": 64, "num_heads": 5}, "image_processor": None}),
        json.dumps({"config": {"depth": 1, "embed_dim": 64, "num_heads": 2}, "image_processor": []}),
    ],
)
def test_a_broken_description_is_named(model, tmp_path, content):
    path = tmp_path / "broken.safetensors"
    save_file(model.state_dict(), path, metadata={"deit_fast": content})
    with pytest.raises(ValueError, match=r"broken\.safetensors.* metadata"):
        load_model(path)


def test_absent_and_truncated_files_are_named(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_model(tmp_path / "absent.safetensors")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated"):
        load_model(path)


def test_weights_must_fit_the_description(path, model):
    save_file({k: v for k, v in model.state_dict().items() if k != "dist_token"}, path, metadata=to_metadata(CONFIG))
    with pytest.raises(ValueError, match="missing: dist_token"):
        load_model(path)


def test_the_wrong_name_is_refused_all_the_same(path):
    with pytest.raises(ValueError, match="doesn't fit"):
        create_model("deit_tiny_patch16_224", checkpoint=path)
