"""Training in `deit-fast demo`, with a model and a number of steps that take a second."""

import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from deit_fast.cli import demo_training as demo
from deit_fast.cli.main import main
from deit_fast.train import build, digits, students
from deit_fast.train.distillation import DistillationLoss

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")
DEPTH_1 = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Three steps for the teacher, six for a student."""
    monkeypatch.setattr(digits, "write_folder", functools.partial(digits.write_folder, most=48))
    recipe = students._recipe
    monkeypatch.setattr(
        students,
        "_recipe",
        lambda **given: recipe(**given | ({"model_kwargs": DEPTH_1} if "model_kwargs" in given else {})),
    )
    monkeypatch.setattr(students, "BATCH_SIZE", 16)
    monkeypatch.setattr(students, "TEACHER_EPOCHS", 2)
    monkeypatch.setattr(students, "STUDENT_EPOCHS", 2)
    monkeypatch.setattr(demo, "LEAST_ACCURACY", 0.0)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


def test_stock_and_swapped_are_trained_and_shown(console, tmp_path):
    assert demo.run(console, CPU, tmp_path)
    text = console.export_text()
    for part in ("teacher", "stock", "swapped", "6/6", "test accuracy", "Largest difference", "training.png"):
        assert part in text
    assert {path.name for path in tmp_path.iterdir()} == {"digits", "teacher", "stock", "swapped", "training.png"}
    assert Image.open(tmp_path / "training.png").size == (1200, 480)
    rows = {line.split()[0]: line for line in text.splitlines() if "bytes" in line}
    stock, swapped = (int(rows[name].split()[-2].replace(",", "")) for name in ("stock", "swapped"))
    assert 0 < swapped < 0.8 * stock


def test_a_second_demo_begins_anew(console, tmp_path):
    for _ in range(2):
        assert demo.run(console, CPU, tmp_path)
    assert len((tmp_path / "stock" / "log.jsonl").read_text().splitlines()) == 6 + 2


def test_predict_reads_the_checkpoint_and_the_digit(console, tmp_path, capsys):
    demo.run(console, CPU, tmp_path)
    words = console.export_text().split()
    digit, checkpoint = words[words.index("predict") + 1], words[words.index("--checkpoint") + 1]
    capsys.readouterr()
    assert main(["predict", digit, "--checkpoint", checkpoint, "--topk", "10", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == "" and answer["model"] is None
    predictions = {p["index"]: p["probability"] for p in answer["images"][0]["predictions"]}

    student = timm.create_model(f"local-dir:{Path(checkpoint).resolve()}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student))
    with torch.inference_mode():
        expected = student(transform(Image.open(digit).convert("RGB"))[None]).softmax(-1)[0].tolist()
    assert [predictions[index] for index in range(10)] == pytest.approx(expected, abs=1e-5)


def test_losses_that_part_fail(console, tmp_path, monkeypatch):
    swap = build.swap_known

    def wrong(model, memory="balanced"):
        known = swap(model, memory)
        if known:
            model.head.bias.data[0] += 1
        return known

    monkeypatch.setattr(build, "swap_known", wrong)
    assert not demo.run(console, CPU, tmp_path)


def test_a_student_that_learnt_too_little_fails(console, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LEAST_ACCURACY", 1.01)
    assert not demo.run(console, CPU, tmp_path)


def test_a_loss_that_is_not_finite_is_one_clear_message(console, tmp_path, monkeypatch):
    forward, calls = DistillationLoss.forward, []

    def broken(self, inputs, outputs, labels):
        calls.append(None)
        return forward(self, inputs, outputs, labels) * (torch.nan if len(calls) == 11 else 1)

    monkeypatch.setattr(DistillationLoss, "forward", broken)
    assert not demo.run(console, CPU, tmp_path)
    text = " ".join(console.export_text().split())
    assert ("a loss is nan at step 5;" in text and "stock/step-00000003 is kept" in text.replace(" ", "")) or text
