"""Ways in which people use a model, each tried on a stock model and on its swapped copy."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.ops import backend
from deit_fast.swap import CallReport
from tests.swap.helpers import gradients, randomise

timm = pytest.importorskip("timm")

# Gives whatever a user would see: outputs, gradients, what hooks were handed.
Situation = Callable[[nn.Module, Tensor], list[Tensor]]


def vit() -> nn.Module:
    """Four blocks of width 96 and three heads, 64 pixels, ten classes."""
    options = {"depth": 4, "img_size": 64, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
    return randomise(timm.create_model("deit_tiny_patch16_224", **options)).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def logits_and_gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    logits = model(x)
    return [logits, *gradients(model, logits.square().sum()).values()]


def report_in(situation: Situation, chosen: str | None = None) -> CallReport:
    """How a swapped model ran in `situation`, having given what stock gives; chosen: its backend."""
    stock, x = vit(), images()
    swapped = copy.deepcopy(stock)
    deit_fast.swap(swapped)
    torch.manual_seed(0)
    expected = situation(stock, x.clone())
    torch.manual_seed(0)
    with backend.forced(chosen):
        found = situation(swapped, x.clone())
    assert_same(found, expected)
    return deit_fast.report(swapped)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """To rounding, each relative to its largest."""
    assert len(found) == len(expected)
    for ours, stock in zip(found, expected, strict=True):
        assert ours.dtype == stock.dtype and ours.shape == stock.shape
        ours, stock = ours.detach(), stock.detach()
        scale = stock.abs().max().item() if stock.numel() else 1.0
        tolerance = 5e-2 if stock.dtype is torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours, stock, rtol=0, atol=tolerance * (scale or 1.0))


def ran(report: CallReport) -> str:
    """ "whole" on the operators, in "parts", or as "stock"."""
    fused = any(calls.fused for calls in report.calls.values())
    return ("parts" if fused else "stock") if report.stock else "whole" if fused else "not at all"
