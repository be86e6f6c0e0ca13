"""Two photographs in `deit-fast demo`, part by part; the whole of it runs in `make demo`."""

import json
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import deit_fast
from deit_fast.cli import demo_inference as demo
from deit_fast.cli.operator_calls import operator_calls

timm = pytest.importorskip("timm")


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=120)


@pytest.fixture
def model():
    # Two blocks of DeiT-Ti on small images.
    return timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=32, num_classes=10).eval()


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(demo.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))


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
    monkeypatch.setattr(demo, "ROUNDS", 1)
    demo.measure(console, {"timm": model}, torch.randn(2, 3, 32, 32))
    row = next(line for line in console.export_text().splitlines() if "timm" in line)
    stock, swapped = [int(cell) for cell in row.replace("│", " ").split()[1:3]]
    assert 0 < swapped < stock


def test_operator_calls_leave_out_views_and_allocations():
    x = torch.randn(4, 4)

    def function():
        y = (x @ x).view(16).unsqueeze(0).expand(2, -1)
        torch.empty(3)
        y[0].add_(1)
        return torch.softmax(y, -1)

    assert operator_calls(function) == 3  # mm, add_, softmax


def test_median_seconds_takes_turns():
    order = []
    seconds = demo.median_seconds([lambda: order.append("a"), lambda: order.append("b")], rounds=2)
    assert order == ["a", "b"] * 3 and len(seconds) == 2


def test_photographs_are_preprocessed():
    names, images = demo.photographs()
    assert names == ["china.jpg", "flower.jpg"] and images.shape == (2, 3, 224, 224)


def test_both_builders_give_the_same_shape_of_model():
    for build in demo.BUILDERS.values():
        model = build(False)
        assert sum(p.numel() for p in model.parameters()) == 22_436_432
        with torch.inference_mode():
            assert demo.logits(model.eval(), torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


# -- weights


def test_offline_is_respected(monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched, reason = demo.weights_can_be_fetched()
    assert not fetched and "HF_HUB_OFFLINE" in reason


def test_a_silent_hub_costs_seconds_only(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(demo, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(demo.urllib.request, "urlopen", lambda *_, **__: time.sleep(2))
    start = time.perf_counter()
    fetched, reason = demo.weights_can_be_fetched()
    assert not fetched and "no model hub" in reason and time.perf_counter() - start < 1


@pytest.mark.parametrize("arrived", [True, False])
def test_a_hub_that_answers_must_also_deliver(monkeypatch, arrived):
    def fetch(command, **kwargs):
        assert kwargs["timeout"] == demo.DOWNLOAD_SECONDS
        if not arrived:
            raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(demo, "hub_answers", lambda: True)
    monkeypatch.setattr(demo.subprocess, "run", fetch)
    assert demo.weights_can_be_fetched()[0] is arrived


# -- the interpreter


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

    def run(command, env, **kwargs):
        assert (env["TRITON_INTERPRET"], env["DEIT_FAST_BACKEND"]) == ("1", "triton")
        stdout = "a library talks\n" + json.dumps(result | changes) + "\n"
        return SimpleNamespace(returncode=returncode, stdout=stdout, stderr="it broke")

    monkeypatch.setattr(demo, "find_spec", lambda name: name)
    monkeypatch.setattr(demo.subprocess, "run", run)


def test_interpreted_kernels_pass(console, monkeypatch):
    interpreted(monkeypatch)
    assert demo.check_kernels(console)
    assert "all 12 blocks" in console.export_text()


def test_a_slow_machine_says_how_much_it_did(console, monkeypatch):
    interpreted(monkeypatch, blocks=5)
    assert demo.check_kernels(console)
    assert "5 of 12 blocks" in console.export_text()


@pytest.mark.parametrize("changes", [{"difference": 1e-3}, {"launches": 0}, {"returncode": 1}], ids=str)
def test_interpreted_kernels_fail(console, monkeypatch, changes):
    interpreted(monkeypatch, **changes)
    assert not demo.check_kernels(console)


@pytest.mark.parametrize("agrees", [True, False])
def test_the_result_says_whether_the_answers_agree(console, monkeypatch, agrees):
    monkeypatch.setattr(demo, "weights_can_be_fetched", lambda: (False, "a test"))
    monkeypatch.setattr(demo, "BUILDERS", {"timm": lambda pretrained: torch.nn.Identity()})
    monkeypatch.setattr(demo, "compare", lambda *_: agrees)
    monkeypatch.setattr(demo, "check_kernels", lambda *_: True)
    monkeypatch.setattr(demo, "measure", lambda *_: None)
    assert demo.run(console, torch.device("cpu")) is agrees
    assert "seed" in console.export_text()
