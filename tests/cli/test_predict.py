"""`deit-fast predict`, through `main` as the console script calls it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import deit_fast
from deit_fast.cli import predict
from deit_fast.cli.main import main
from deit_fast.data.evaluation import image_processor

MODEL = "deit_tiny_patch16_224"
LABELS = ["cat", "dog", "[bold]bird"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    paths = [str(folder / name) for name in ("first.png", "second.jpg")]
    for path, size in zip(paths, [(60, 80, 3), (300, 200, 3)], strict=True):
        Image.fromarray(generator.integers(256, size=size, dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return deit_fast.create_model(MODEL, num_classes=3).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file(model.state_dict(), path)
    return str(path)


@pytest.fixture
def labels(tmp_path) -> str:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n")
    return str(path)


@pytest.fixture
def no_model(monkeypatch):
    """For mistakes that must be found before any work."""
    monkeypatch.setattr(predict, "create_model", lambda *_, **__: pytest.fail("a model was built"))


def fails(capsys, *arguments: str) -> str:
    """Run a command line that must fail on a mistake in the input; return its one line."""
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("deit-fast: error: ") and err.count("\n") == 1
    return err


def test_json_has_the_models_own_probabilities(capsys, images, model, checkpoint, labels):
    options = ["--model", MODEL, "--checkpoint", checkpoint, "--labels", labels, "--topk", "2", "--json"]
    assert main(["predict", *images, *options]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == "" and list(result) == ["model", "checkpoint", "device", "images"]
    assert (result["model"], result["checkpoint"]) == (MODEL, checkpoint)
    assert [entry["image"] for entry in result["images"]] == images

    pixels = image_processor(None, 224)(images, return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = model(pixels).softmax(-1).topk(2)
    for entry, values, indices in zip(result["images"], expected.values, expected.indices, strict=True):
        predictions = entry["predictions"]
        assert [p["index"] for p in predictions] == indices.tolist()
        assert [p["label"] for p in predictions] == [LABELS[i] for i in indices]
        assert [p["probability"] for p in predictions] == pytest.approx(values.tolist(), abs=1e-6)


def test_tables_show_labels_as_they_are(capsys, images, checkpoint, labels):
    options = ["--model", MODEL, "--checkpoint", checkpoint, "--labels", labels, "--topk", "3"]
    assert main(["predict", *images, *options]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "random" not in out
    for text in ("first.png", "second.jpg", *LABELS):
        assert text in out.replace("\n", "")


def test_random_weights_are_called_random(capsys, images, labels):
    assert main(["predict", images[0], "--model", MODEL, "--labels", labels, "--topk", "1"]) == 0
    out, err = capsys.readouterr()
    assert "random" in out and "--checkpoint" in err and "random" in err
    assert main(["predict", images[0], "--model", MODEL, "--labels", labels, "--topk", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["checkpoint"] is None and "random" in err


def test_classes_without_names_are_numbers(capsys, images, checkpoint):
    assert main(["predict", images[0], "--model", MODEL, "--checkpoint", checkpoint, "--topk", "3", "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)["images"][0]["predictions"]
    assert sorted(p["label"] for p in predictions) == ["0", "1", "2"]


def test_a_transformers_folder_brings_labels_and_preprocessing(capsys, tmp_path, images):
    transformers = pytest.importorskip("transformers")
    config = transformers.DeiTConfig(
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=768,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    model = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    processor = transformers.DeiTImageProcessor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = [
        "--model",
        "deit_tiny_distilled_patch16_224",
        "--checkpoint",
        str(tmp_path),
        "--topk",
        "1",
        "--json",
    ]
    assert main(["predict", images[0], *options]) == 0
    [prediction] = json.loads(capsys.readouterr().out)["images"][0]["predictions"]
    with torch.inference_mode():
        logits = model(**processor(Image.open(images[0]), return_tensors="pt")).logits[0]
    assert prediction["label"] == LABELS[logits.argmax()]
    assert prediction["probability"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)


def test_more_images_than_a_batch(capsys, monkeypatch, images, checkpoint):
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    paths = [images[0], images[1], images[0]]
    assert main(["predict", *paths, "--model", MODEL, "--checkpoint", checkpoint, "--topk", "1", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["images"]
    assert [entry["image"] for entry in entries] == paths
    assert entries[0]["predictions"][0]["probability"] == pytest.approx(
        entries[2]["predictions"][0]["probability"], abs=1e-6
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"[1, 2]", b'["cat"', b'{"0": "cat", "2": "dog"}', b'{"cat": 0}', b"\xff\xfe\x00"],
)
def test_a_wrong_label_file_is_named(capsys, no_model, tmp_path, images, content):
    path = tmp_path / "names.json"
    path.write_bytes(content)
    assert str(path) in fails(capsys, images[0], "--labels", str(path))


@pytest.mark.parametrize("content", [b"no image", None], ids=["text", "absent"])
def test_a_bad_image_stops_before_any_work(capsys, no_model, tmp_path, images, content):
    bad = tmp_path / "bad.png"
    if content is not None:
        bad.write_bytes(content)
    assert str(bad) in fails(capsys, images[0], str(bad))


def test_label_count_must_be_the_class_count(capsys, no_model, tmp_path, images, checkpoint):
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    options = ["--checkpoint", checkpoint, "--labels", str(tmp_path / "two.txt")]
    assert "2 labels, the model 3 classes" in fails(capsys, images[0], *options)


@pytest.mark.parametrize("topk", ["0", "4", "-1"])
def test_topk_must_be_a_number_of_classes(capsys, no_model, images, checkpoint, topk):
    assert "1 to 3" in fails(capsys, images[0], "--checkpoint", checkpoint, "--topk", topk)


def test_unknown_models_and_devices(capsys, images):
    assert "deit_tiny_patch16_224" in fails(capsys, images[0], "--model", "deit_tiny_patch16")
    assert "--device tpu9" in fails(capsys, images[0], "--device", "tpu9")
    if not torch.cuda.is_available():
        assert "--device cuda" in fails(capsys, images[0], "--device", "cuda")


def test_unusable_checkpoints_are_named(capsys, no_model, tmp_path, images, model, checkpoint):
    assert "absent.pth" in fails(capsys, images[0], "--checkpoint", str(tmp_path / "absent.pth"))
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(Path(checkpoint).read_bytes()[:1000])
    assert str(truncated) in fails(capsys, images[0], "--checkpoint", str(truncated))
    headless = tmp_path / "headless.safetensors"
    save_file({k: v for k, v in model.state_dict().items() if not k.startswith("head.")}, headless)
    assert "no classifier head" in fails(capsys, images[0], "--checkpoint", str(headless))


def test_a_checkpoint_of_another_model_is_refused(capsys, images, checkpoint):
    # The one message of several lines: it lists every key.
    arguments = [images[0], "--model", "deit_small_patch16_224", "--checkpoint", checkpoint, "--topk", "3"]
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("deit-fast: error: ") and "pos_embed" in err
    assert "Traceback" not in err
