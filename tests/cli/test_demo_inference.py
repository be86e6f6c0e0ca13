"""Two photographs in `deit-fast demo`, part by part; the whole of it runs in `make demo`."""

import json
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console

import deit_fast
from deit_fast.benchmark import photographs
from deit_fast.cli import demo_inference as demo

timm = pytest.importorskip("timm")


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


@pytest.fixture
def model():
    # Two blocks of DeiT-Ti on small images.
    return timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=32, num_classes=10).eval()


LABELS = [str(index) for index in range(10)]


def compare(console, model) -> bool:
    return demo.compare(console, "timm", model, ["one", "two"], torch.randn(2, 3, 32, 32), LABELS)


def test_compare_shows_the_answers_and_restores_the_model(console, model):
    kind = type(model.blocks[0])
    assert compare(console, model)
    assert type(model.blocks[0]) is kind
    text = console.export_text()
    for part in ("blocks.0", "one", "two", "swapped", "top 5 agree", "bitwise the stock answer"):
        assert part in text


def test_compare_fails_on_a_wrong_answer(console, model, monkeypatch):
    def break_model(model):
        model.head.bias.data += 2 * demo.TOLERANCE
        model.head_dist.bias.data += 2 * demo.TOLERANCE
        return "broken"

    monkeypatch.setattr(deit_fast, "swap", break_model)
    monkeypatch.setattr(deit_fast, "restore", lambda model: None)
    assert not compare(console, model)
    assert "NOT the stock answer" in console.export_text()


def test_measure_counts_fewer_calls_for_the_swapped_model(console, model, monkeypatch):
    monkeypatch.setattr(photographs, "ROUNDS", 1)
    demo.measure(console, {"timm": model}, torch.randn(2, 3, 32, 32))
    row = next(line for line in console.export_text().splitlines() if "timm" in line)
    stock, swapped = [int(cell) for cell in row.replace("│", " ").split()[1:3]]
    assert 0 < swapped < stock


def child(monkeypatch, code: str) -> None:
    """Python code in the place of the interpreter's process."""
    popen = subprocess.Popen

    def start(command, env, **pipes):
        assert (env["TRITON_INTERPRET"], env["DEIT_FAST_BACKEND"]) == ("1", "triton")
        assert command[1:] == ["-m", "deit_fast.benchmark.interpreter_check"]
        return popen([sys.executable, "-c", code], **pipes)

    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    monkeypatch.setattr(demo.subprocess, "Popen", start)


def interpreted(monkeypatch, returncode: int = 0, **changes) -> None:
    result = {
        "model": "deit",
        "blocks": 12,
        "blocks_of_model": 12,
        "launches": 60,
        "seconds": 1.0,
        "scale": 1.0,
        "difference": 1e-6,
    }
    launches = [json.dumps({"launch": launch, "of": 60}) for launch in range(1, 61)]
    lines = ["a library talks", *launches, json.dumps(result | changes)]
    child(monkeypatch, f"print({chr(10).join(lines)!r}); raise SystemExit({returncode})")


def test_interpreted_kernels_pass(console, monkeypatch):
    interpreted(monkeypatch)
    assert demo.check_kernels(console)
    text = console.export_text()
    assert "all 12 blocks" in text
    # The console of a test is no terminal: the bar is shown in lines.
    assert all(f"launches: {launch} of 60" in text for launch in (15, 30, 45))


def test_a_slow_machine_says_how_much_it_did(console, monkeypatch):
    interpreted(monkeypatch, blocks=5)
    assert demo.check_kernels(console)
    assert "5 of 12 blocks" in console.export_text()


@pytest.mark.parametrize("changes", [{"difference": 1e-3}, {"launches": 0}, {"returncode": 1}], ids=str)
def test_interpreted_kernels_fail(console, monkeypatch, changes):
    interpreted(monkeypatch, **changes)
    assert not demo.check_kernels(console)


def test_a_process_that_breaks_is_shown(console, monkeypatch):
    child(monkeypatch, "raise SystemExit('it broke')")
    assert not demo.check_kernels(console)
    assert "it broke" in console.export_text()


def test_a_process_that_takes_too_long_is_stopped(console, monkeypatch):
    monkeypatch.setattr(demo, "INTERPRETER_SECONDS", 0.5)
    child(monkeypatch, "import time; time.sleep(60)")
    start = time.perf_counter()
    assert not demo.check_kernels(console)
    assert "No result within 0.5 s" in console.export_text() and time.perf_counter() - start < 30


@pytest.mark.parametrize("agrees", [True, False])
def test_the_result_says_whether_the_answers_agree(console, monkeypatch, agrees):
    monkeypatch.setattr(demo, "weights_can_be_fetched", lambda: (False, "a test"))
    monkeypatch.setattr(demo, "BUILDERS", {"timm": lambda pretrained: torch.nn.Identity()})
    monkeypatch.setattr(demo, "compare", lambda *_: agrees)
    monkeypatch.setattr(demo, "check_kernels", lambda *_: True)
    monkeypatch.setattr(demo, "measure", lambda *_: None)
    assert demo.run(console, torch.device("cpu")) is agrees
    assert "seed" in console.export_text()
