"""The entry points and the report."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from deit_fast.kernels.linear import vendor_gemm
from deit_fast.ops import backend
from deit_fast.swap import SwapReport, restore, swap, swapped
from tests.swap.helpers import operator_calls, randomise

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import Block  # noqa: E402


def vit(**kwargs) -> nn.Module:
    kwargs = {"depth": 3, "img_size": 32, "num_classes": 10} | kwargs
    return randomise(timm.create_model("deit_tiny_patch16_224", **kwargs)).eval()


def test_the_report_lists_every_module_that_runs_on_the_operators() -> None:
    model = vit(depth=1)
    report = swap(model)
    assert isinstance(report, SwapReport)
    assert report.kept == {}
    assert report.swapped == [
        "",
        "patch_embed",
        "blocks.0",
        "blocks.0.norm1",
        "blocks.0.attn",
        "blocks.0.norm2",
        "blocks.0.mlp",
        "norm",
    ]


def test_the_report_prints_as_a_table_with_numbered_modules_in_one_row() -> None:
    model = vit(qk_norm=True)
    model.blocks[1].mlp.act = nn.ReLU()
    lines = str(swap(model)).splitlines()
    assert lines[0] == "17 swapped, 7 kept"
    assert lines[2].split() == ["module", "class", "number", "outcome"]
    rows = {tuple(line.split(maxsplit=3)[:3]): line.split(maxsplit=3)[3] for line in lines[4:]}
    assert rows["(model)", "VisionTransformer", "1"] == "swapped"
    assert rows["blocks.0-2", "Block", "3"] == "kept: attn: normalizes queries and keys"
    assert rows["blocks.0,2.mlp", "Mlp", "2"] == "swapped"
    assert rows["blocks.1.mlp", "Mlp", "1"] == "kept: its activation is ReLU, not GELU"
    assert rows["blocks.0-2.norm2", "LayerNorm", "3"] == "swapped"


def test_the_report_says_what_the_vendors_gemm_has_computed(monkeypatch) -> None:
    report = swap(vit(depth=1))
    monkeypatch.setattr(vendor_gemm, "used", {})
    monkeypatch.setattr(backend, "by_vendor", vendor_gemm.used)
    assert "vendor" not in str(report)
    vendor_gemm.multiply("linear", torch.ones(2, 3), torch.ones(3, 4), torch.empty(2, 4))
    assert str(report).splitlines()[-1] == "by the vendor's GEMM: linear 3×4"


def test_swapping_twice_changes_nothing_and_reports_the_same() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    first = swap(model)
    classes = [type(module) for module in model.modules()]
    expected = model(x)
    assert swap(model) == first
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
    restore(model)
    assert type(model.blocks[0]) is Block


def test_swapping_again_reports_what_changed_since() -> None:
    model = vit(attn_drop_rate=0.1).train()
    assert swap(model).kept["blocks.0"] == "attn: dropout is active"
    model.eval()
    assert swap(model).kept == {}


def test_restoring_a_model_that_was_never_swapped_leaves_it_alone() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    classes = [type(module) for module in model.modules()]
    expected = model(x)
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), expected)
    restore(nn.Linear(2, 2))


def test_the_context_manager_restores_also_after_an_exception() -> None:
    model = vit()
    with swapped(model) as report:
        assert "blocks.0" in report.swapped
        assert type(model.blocks[0]) is not Block
    assert type(model.blocks[0]) is Block
    with pytest.raises(KeyError), swapped(model):
        raise KeyError
    assert type(model.blocks[0]) is Block


def test_the_context_manager_leaves_what_was_swapped_before() -> None:
    model, x = vit(), torch.randn(1, 3, 32, 32)
    swap(model.blocks[0])
    with swapped(model):
        calls = operator_calls(lambda: model(x))
        assert calls["attention"] == 2 and calls["readout_attention"] == 1
    assert operator_calls(lambda: model(x)) == operator_calls(lambda: model.blocks[0](torch.randn(1, 5, 192)))


def test_one_block_can_be_swapped() -> None:
    model = vit()
    report = swap(model.blocks[1])
    assert report.swapped[0] == ""
    assert type(model.blocks[0]) is Block and type(model.blocks[1]) is not Block


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(4, 4),
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()),
        nn.TransformerEncoderLayer(8, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_without_anything_known_is_an_error_that_says_what_is_supported(model: nn.Module) -> None:
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*timm.*deit3.*transformers.*original DeiT"):
        swap(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("thing", [None, torch.zeros(2), Block], ids=["None", "tensor", "class"])
def test_what_is_no_module_is_an_error(thing) -> None:
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module"):
        swap(thing)


class TwiceBlock(Block):
    def forward(self, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return super().forward(super().forward(x, **kwargs), **kwargs)


def test_a_subclass_with_its_own_forward_is_kept_and_its_parts_are_swapped() -> None:
    model, x = randomise(nn.Sequential(TwiceBlock(64, 2), Block(64, 2))).eval(), torch.randn(2, 5, 64)
    expected = model(x)
    report = swap(model)
    assert report.kept == {"0": "TwiceBlock is a subclass of Block with code of its own"}
    assert "0.attn" in report.swapped
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_no_library_is_imported_that_the_model_does_not_come_from() -> None:
    program = (
        "import sys, torch\n"
        "from deit_fast.swap import swap\n"
        "try: swap(torch.nn.Linear(1, 1))\n"
        "except ValueError: pass\n"
        "import timm; swap(timm.models.vision_transformer.Block(8, 2))\n"
        "print('transformers' in sys.modules, 'deit_fast.swap.transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_a_swapped_class_answers_to_its_stock_classs_names() -> None:
    model = vit(depth=1)
    names = [(type(m).__module__, type(m).__qualname__, type(m).__name__, type(m).__doc__) for m in model.modules()]
    swap(model)
    assert type(model.blocks[0]) is not Block
    found = [(type(m).__module__, type(m).__qualname__, type(m).__name__, type(m).__doc__) for m in model.modules()]
    assert found == names
