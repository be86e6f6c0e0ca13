"""What `deit_fast.report` says of the calls of a swapped model."""

import copy

import pytest
import torch
from torch import nn

import deit_fast
from tests.swap.helpers import randomise

timm = pytest.importorskip("timm")


def vit(**options) -> nn.Module:
    return randomise(timm.create_model("deit_tiny_patch16_224", depth=3, img_size=32, num_classes=10, **options)).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32)


def test_every_call_is_counted_with_why_it_was_stock() -> None:
    model = vit()
    deit_fast.swap(model)
    model(images())
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    model(images())
    handle.remove()
    model(images())
    report = deit_fast.report(model)
    calls = report.calls["blocks.1"]
    assert (calls.fused, calls.stock, calls.reason) == (2, 1, "mlp has a hook")
    assert report.calls[""].fused == report.calls["blocks.0"].fused == report.calls["blocks.2"].fused == 3
    assert report.calls["blocks.1.mlp"].fused == 1
    assert report.stock == {"blocks.1": "mlp has a hook"}


def test_it_prints_as_a_table_with_modules_of_one_outcome_in_one_row() -> None:
    model = vit()
    deit_fast.swap(model)
    model(images())
    model.blocks[1].attn.qkv.register_forward_hook(lambda *_: None)
    model(images())
    lines = str(deit_fast.report(model)).splitlines()
    assert lines[0].split() == ["module", "class", "number", "fused", "stock"]
    rows = {line.split(maxsplit=4)[0]: line.split(maxsplit=4)[1:] for line in lines[2:]}
    assert rows["(model)"] == ["VisionTransformer", "1", "2", "0"]
    assert rows["blocks.0,2"] == ["Block", "2", "2", "0"]
    assert rows["blocks.1"] == ["Block", "1", "1", "1, the last: attn: qkv has a hook"]


def test_a_model_that_is_not_swapped_has_no_calls() -> None:
    model = vit()
    model(images())
    assert deit_fast.report(model).calls == {}
    deit_fast.swap(model)
    model(images())
    deit_fast.restore(model)
    assert deit_fast.report(model).calls == {}
    assert not any("_deit_fast_calls" in module.__dict__ for module in model.modules())


def test_a_copys_calls_are_its_own() -> None:
    model = vit()
    deit_fast.swap(model)
    model(images())
    twin = copy.deepcopy(model)
    twin(images())
    assert deit_fast.report(model).calls[""].fused == 1
    assert deit_fast.report(twin).calls[""].fused == 2


def test_compiled_calls_are_not_counted_and_compile_once() -> None:
    model = vit()
    deit_fast.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad(), torch.compiler.set_stance("default"):
        for _ in range(3):
            compiled(images())
    assert deit_fast.report(model).calls[""].fused == 0
    torch.compiler.reset()
