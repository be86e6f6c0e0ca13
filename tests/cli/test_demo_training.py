"""Training in `deit-fast demo`, with a model and a number of steps that take a second."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

import deit_fast
from deit_fast.cli import demo_training as demo
from deit_fast.cli.main import main
from deit_fast.models import load_model
from deit_fast.train import digits, students

pytest.importorskip("timm")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def splits() -> list[digits.Split]:
    return [digits.Split(*(part[:100] for part in split)) for split in digits.load()]


@pytest.fixture(autouse=True)
def small(monkeypatch, splits):
    monkeypatch.setattr(digits, "load", lambda seed: splits)
    monkeypatch.setattr(students, "CONFIG", replace(students.CONFIG, embed_dim=32, depth=1, num_heads=1))
    monkeypatch.setattr(students, "BATCH_SIZE", 16)
    monkeypatch.setattr(students, "TEACHER_STEPS", 3)
    monkeypatch.setattr(students, "STUDENT_STEPS", 6)
    monkeypatch.setattr(demo, "LEAST_ACCURACY", 0.0)


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


def test_stock_and_swapped_are_trained_and_shown(console, tmp_path):
    assert demo.run(console, CPU, tmp_path)
    text = console.export_text()
    for part in ("teacher", "stock", "swapped", "6/6", "test accuracy", "Largest difference", "training.png"):
        assert part in text
    [digit] = tmp_path.glob("digit-*.png")
    assert {path.name for path in tmp_path.iterdir()} == {
        "stock.safetensors", "swapped.safetensors", "training.png", digit.name
    }  # fmt: skip
    assert Image.open(tmp_path / "training.png").size == (1200, 480)
    rows = {line.split()[0]: line for line in text.splitlines() if "bytes" in line}
    stock, swapped = (int(rows[name].split()[-2].replace(",", "")) for name in ("stock", "swapped"))
    assert 0 < swapped < 0.8 * stock


def test_predict_reads_the_checkpoint_and_the_digit(console, tmp_path, capsys, splits):
    demo.run(console, CPU, tmp_path)
    capsys.readouterr()
    [digit] = tmp_path.glob("digit-*.png")
    checkpoint = tmp_path / "swapped.safetensors"
    assert main(["predict", str(digit), "--checkpoint", str(checkpoint), "--topk", "10", "--json"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == "" and answer["model"] is None
    predictions = {p["index"]: p for p in answer["images"][0]["predictions"]}

    test_split = splits[1]
    assert digit.name == f"digit-{test_split.labels[0]}.png"
    student = students.build_student()
    student.load_state_dict(load_model(checkpoint).state_dict())
    with torch.inference_mode():
        expected = student.eval()(test_split.images[:1]).softmax(-1)[0]
    for index, probability in enumerate(expected.tolist()):
        assert predictions[index]["label"] == str(index)
        assert predictions[index]["probability"] == pytest.approx(probability, abs=1e-5)


def test_losses_that_part_fail(console, tmp_path, monkeypatch):
    swap = deit_fast.swap

    def wrong(model):
        swap(model)
        model.head.bias.data[0] += 1

    monkeypatch.setattr(deit_fast, "swap", wrong)
    assert not demo.run(console, CPU, tmp_path)


def test_a_student_that_learnt_too_little_fails(console, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LEAST_ACCURACY", 1.01)
    assert not demo.run(console, CPU, tmp_path)


def test_a_loss_that_is_not_finite_is_one_clear_message(console, tmp_path, monkeypatch):
    class Broken(nn.Module):
        def __init__(self, *_, **__):
            super().__init__()
            self.calls = 0

        def forward(self, inputs, outputs, labels):
            self.calls += 1
            return outputs[0].sum() * (torch.nan if self.calls == 4 else 1)

    monkeypatch.setattr(deit_fast, "DistillationLoss", Broken)
    monkeypatch.setattr(students, "SAVE_EVERY", 2)
    assert not demo.run(console, CPU, tmp_path)
    text = " ".join(console.export_text().split())
    assert "nan at step 4 of 6" in text and "stock.safetensors keeps the weights after step 1" in text
    assert load_model(tmp_path / "stock.safetensors").config == students.CONFIG
