"""Checkpoints between the layouts of three libraries: the same bits, loaded by each of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deit_fast.models import VisionTransformer, create_model, load_model
from deit_fast.models.conversion import convert
from deit_fast.models.description import to_metadata

PLAIN, DISTILLED, DEIT3 = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"


@pytest.fixture
def timm_folder(timm_model, tmp_path):
    """`timm_folder(name)`: a model and the folder that timm has saved it to."""
    timm = pytest.importorskip("timm")

    def save(name, **options):
        model = timm_model(name, **options)
        timm.models.save_for_hf(model, str(tmp_path / "timm"), safe_serialization=True)
        return model, tmp_path / "timm"

    return save


def logits(model, images):
    with torch.inference_mode():
        found = model.eval()(images)
    return getattr(found, "logits", found)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def by_transformers(folder, images):
    """The logits of the class that the folder names, which must find every weight."""
    transformers = pytest.importorskip("transformers")
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return logits(model, images)


def by_timm(folder, images):
    timm = pytest.importorskip("timm")
    return logits(timm.create_model(f"local-dir:{folder}", pretrained=True), images)


# The round trip


@pytest.mark.parametrize("name", [PLAIN, DISTILLED])
def test_a_model_goes_round_the_three_libraries_and_each_computes_the_same(name, timm_folder, tmp_path, images):
    model, source = timm_folder(name)
    expected = logits(model, images)
    there, original, back = tmp_path / "transformers", tmp_path / "original.pth", tmp_path / "back"
    for before, after, layout in (
        (source, there, "transformers"), (there, original, "original"), (original, back, "timm")
    ):  # fmt: skip
        config, _ = convert(before, after, layout)
        assert (config.depth, config.num_heads, config.num_classes, config.img_size) == (2, 3, 10, 64)
    stock, ours = (load_file(folder / "model.safetensors") for folder in (source, back))
    assert stock.keys() == ours.keys() and all(torch.equal(stock[key], ours[key]) for key in stock)

    assert_same(by_transformers(there, images), expected)
    assert_same(by_timm(back, images), expected)
    assert json.loads((back / "config.json").read_text())["architecture"] == name
    read = torch.load(original, weights_only=True)["model"]
    model.load_state_dict(read)
    assert read["cls_token"].untyped_storage().nbytes() == read["cls_token"].nbytes


@pytest.mark.parametrize("file", ["x.pth", "x.safetensors"])
def test_deit_iii_goes_to_the_original_repository_and_back(file, timm_folder, tmp_path, images):
    model, source = timm_folder(DEIT3)
    convert(source, tmp_path / file, "original")
    names = torch.load(tmp_path / file)["model"] if file == "x.pth" else load_file(tmp_path / file)
    assert "blocks.0.gamma_1" in names and "blocks.0.ls1.gamma" not in names
    config, _ = convert(tmp_path / file, tmp_path / "back", "timm")
    assert config.no_embed_class and config.init_values
    assert_same(by_timm(tmp_path / "back", images), logits(model, images))
    if file == "x.safetensors":
        assert_same(logits(load_model(tmp_path / file), images), logits(model, images))


@pytest.mark.parametrize("kind", ["DeiTForImageClassificationWithTeacher", "ViTForImageClassification"])
def test_what_transformers_saved_loads_in_timm_with_its_sizes(kind, transformers_model, tmp_path):
    size = {"image_size": 48, "patch_size": 8, "num_channels": 1, "num_labels": 3, "num_hidden_layers": 3}
    model = transformers_model(kind, hidden_size=48, num_attention_heads=4, intermediate_size=96, **size)
    model.save_pretrained(tmp_path / "theirs")
    config, notes = convert(tmp_path / "theirs", tmp_path / "timm", "timm")
    assert (config.num_heads, config.mlp_ratio, config.in_chans) == (4, 2.0, 1)
    assert notes == ["LayerNorm's epsilon is 1e-12; timm computes with 1e-06"]
    images = torch.randn(2, 1, 48, 48)
    torch.testing.assert_close(by_timm(tmp_path / "timm", images), logits(model, images), rtol=1e-3, atol=1e-3)

    # Nothing is lost between folders that say what they hold.
    convert(tmp_path / "timm", tmp_path / "back", "transformers")
    assert_same(by_transformers(tmp_path / "back", images), logits(model, images))
    stock, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "back"))
    stock = {key: tensor for key, tensor in stock.items() if "pooler" not in key}
    assert stock.keys() == ours.keys() and all(torch.equal(stock[key], ours[key]) for key in stock)


def test_create_model_loads_each_target(timm_folder, tmp_path):
    _, source = timm_folder(DISTILLED, depth=12, num_classes=3)
    targets = {"transformers": tmp_path / "a", "timm": tmp_path / "b", "original": tmp_path / "c.pth"}
    found = []
    for layout, target in targets.items():
        convert(source, target, layout)
        found.append(create_model(DISTILLED, num_classes=3, img_size=64, checkpoint=target).state_dict())
    expected = load_file(source / "model.safetensors")
    assert all(torch.equal(each[key], expected[key]) for each in found for key in expected)


def test_bfloat16_images_that_are_no_squares_and_no_head(small_config, tmp_path):
    config = small_config(DISTILLED, img_size=(64, 32), num_classes=0)
    model = VisionTransformer(config, dtype=torch.bfloat16)
    save_file(model.state_dict(), tmp_path / "x.safetensors", metadata=to_metadata(config))
    convert(tmp_path / "x.safetensors", tmp_path / "timm", "timm")
    convert(tmp_path / "timm", tmp_path / "there", "transformers")
    assert convert(tmp_path / "there", tmp_path / "back.safetensors", "original").config == config
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[key], tensor) for key, tensor in model.state_dict().items())
    features = by_timm(tmp_path / "timm", torch.randn(1, 3, 64, 32))
    assert features.shape == (1, 192)
    transformers = pytest.importorskip("transformers")
    there = transformers.DeiTModel.from_pretrained(tmp_path / "there", add_pooling_layer=False)
    assert there.dtype == torch.bfloat16


# What is refused, before anything is written


def saved(model, path):
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize(
    ("layout", "target", "message"),
    [
        ("keras", "x", "layout must be one of timm, transformers, original"),
        ("timm", "x.safetensors", "the target for timm is a folder"),
        ("original", "x", "the target for original is a .safetensors or .pth file"),
        ("transformers", "x", "have no LayerScale"),
    ],
)
def test_targets_that_can_not_hold_the_model_are_refused(layout, target, message, timm_model, tmp_path):
    source = saved(timm_model(DEIT3), tmp_path / "deit3.pth")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / target, layout)
    assert list(tmp_path.iterdir()) == [source]


def test_a_source_that_is_no_deit_is_refused_with_all_that_is_wrong(timm_model, tmp_path):
    state_dict = timm_model(PLAIN).state_dict()
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"holds no DeiT: it has no patch_embed\.proj\.weight"):
        convert(tmp_path / "other.pth", tmp_path / "x", "timm")
    del state_dict["blocks.1.norm2.bias"]
    torch.save(state_dict | {"fc_norm.weight": torch.ones(192)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match=r"(?s)missing: blocks\.1\.norm2\.bias.*unexpected: fc_norm\.weight"):
        convert(tmp_path / "part.pth", tmp_path / "x", "timm")
    assert not (tmp_path / "x").exists()


def test_a_target_that_is_there_stays_unless_it_is_a_checkpoint_to_replace(timm_model, tmp_path):
    source = saved(timm_model(PLAIN), tmp_path / "plain.pth")
    folder, file = tmp_path / "folder", tmp_path / "file.pth"
    for target, layout in ((folder, "timm"), (file, "original")):
        convert(source, target, layout)
        with pytest.raises(FileExistsError, match="is there already"):
            convert(source, target, layout)
        convert(source, target, layout, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"plain.pth", "folder", "file.pth"}
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds more than a checkpoint, and stays: notes\.txt"):
        convert(source, folder, "timm", force=True)


def test_a_checkpoint_may_be_replaced_by_its_own_conversion(timm_folder, images):
    model, folder = timm_folder(PLAIN)
    convert(folder, folder, "transformers", force=True)
    assert_same(by_transformers(folder, images), logits(model, images))


@pytest.mark.parametrize("target", ["x", "x.pth"])
def test_a_full_disk_leaves_what_was_there(target, timm_model, tmp_path, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("No space left on device")

    source, layout = saved(timm_model(PLAIN), tmp_path / "plain.pth"), "original" if target == "x.pth" else "timm"
    convert(source, tmp_path / target, layout)
    monkeypatch.setattr("deit_fast.models.conversion.save_file", full)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written: No space left"):
        convert(source, tmp_path / target, layout, force=True)
    monkeypatch.undo()
    assert convert(tmp_path / target, tmp_path / "again", "timm").config.num_classes == 10
    assert {path.name for path in tmp_path.iterdir()} == {"plain.pth", target, "again"}
