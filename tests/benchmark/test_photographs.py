"""What `deit-fast demo` compares: models, photographs, and whether weights can be had for them."""

import subprocess
import time

import pytest
import torch

from deit_fast.benchmark import photographs

pytest.importorskip("timm")


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(photographs.urllib.request, "urlopen", lambda *_, **__: pytest.fail("the network was asked"))


def test_median_seconds_takes_turns():
    order = []
    seconds = photographs.median_seconds([lambda: order.append("a"), lambda: order.append("b")], rounds=2)
    assert order == ["a", "b"] * 3 and len(seconds) == 2


def test_photographs_are_preprocessed():
    names, images = photographs.photographs()
    assert names == ["china.jpg", "flower.jpg"] and images.shape == (2, 3, 224, 224)


def test_both_builders_give_the_same_shape_of_model():
    for build in photographs.BUILDERS.values():
        model = build(False)
        assert sum(p.numel() for p in model.parameters()) == 22_436_432
        with torch.inference_mode():
            assert photographs.logits(model.eval(), torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_offline_is_respected(monkeypatch, no_network):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetched, reason = photographs.weights_can_be_fetched()
    assert not fetched and "HF_HUB_OFFLINE" in reason


def test_a_silent_hub_costs_seconds_only(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(photographs, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(photographs.urllib.request, "urlopen", lambda *_, **__: time.sleep(2))
    start = time.perf_counter()
    fetched, reason = photographs.weights_can_be_fetched()
    assert not fetched and "no model hub" in reason and time.perf_counter() - start < 1


@pytest.mark.parametrize("arrived", [True, False])
def test_a_hub_that_answers_must_also_deliver(monkeypatch, arrived):
    def fetch(command, **kwargs):
        assert kwargs["timeout"] == photographs.DOWNLOAD_SECONDS
        if not arrived:
            raise subprocess.TimeoutExpired(command, kwargs["timeout"])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(photographs, "hub_answers", lambda: True)
    monkeypatch.setattr(photographs.subprocess, "run", fetch)
    assert photographs.weights_can_be_fetched()[0] is arrived
