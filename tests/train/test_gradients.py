"""Whole-model gradients, stock and swapped, parameter by parameter against the stock model in float64."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.swap import swap
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.swap.helpers import randomise

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

BATCH, SIZE, CLASSES = 4, 48, 64
DROP_PATH = 0.1
# The key bias cancels in the softmax: its true gradient is zero, and what is found is the rounding of sums whose
# terms are of the query bias's size. Stock was seen at up to 4.5 eps of that one's largest element.
KEY_BIAS_EPS = 16.0

TIMM = {
    "timm Ti": ("deit_tiny_patch16_224", {}),
    "timm Ti distilled": ("deit_tiny_distilled_patch16_224", {}),
    "timm Ti distilled, LayerScale": ("deit_tiny_distilled_patch16_224", {"init_values": 0.5}),
    "timm S": ("deit_small_patch16_224", {}),
    "timm S distilled": ("deit_small_distilled_patch16_224", {}),
    "timm DeiT III S": ("deit3_small_patch16_224", {}),
}
TRANSFORMERS = {
    "transformers Ti": ("DeiTForImageClassification", 192),
    "transformers Ti distilled": ("DeiTForImageClassificationWithTeacher", 192),
    "transformers S distilled": ("DeiTForImageClassificationWithTeacher", 384),
    "transformers ViT S": ("ViTForImageClassification", 384),
}


def build(name: str) -> nn.Module:
    """Two blocks, in training: both heads where there are two, drop path where the library has it."""
    if name in TIMM:
        timm_name, options = TIMM[name]
        options = {"img_size": SIZE, "num_classes": CLASSES, "drop_path_rate": DROP_PATH} | options
        model = timm.create_model(timm_name, depth=2, **options)
        if "distilled" in name:
            model.set_distilled_training(True)
    else:
        class_name, width = TRANSFORMERS[name]
        config_class = transformers.ViTConfig if class_name.startswith("ViT") else transformers.DeiTConfig
        config = config_class(
            hidden_size=width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            image_size=SIZE,
            num_labels=CLASSES,
        )
        model = getattr(transformers, class_name)(config)
    return randomise(model).train()


@dataclass(frozen=True)
class Precision:
    parameters: torch.dtype
    autocast: torch.dtype | None = None


PRECISIONS = {
    "float32": Precision(torch.float32),
    "autocast": Precision(torch.float32, autocast=torch.bfloat16),
    "bfloat16": Precision(torch.bfloat16),
}


def heads_of(output) -> Sequence[Tensor]:
    """The logits of every head, in each library's own convention."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, tuple):
        return output
    return [output[key] for key in ("cls_logits", "distillation_logits") if key in output] or [output.logits]


def gradients(model: nn.Module, precision: Precision, *, start: torch.dtype) -> dict[str, Tensor]:
    """Of every parameter and of the images; parameters and images are first rounded to `start`."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    images = images.to(start).to(precision.parameters).requires_grad_()
    model = model.to(start).to(precision.parameters)
    # The same drop path masks every time.
    torch.manual_seed(0)
    with torch.autocast("cpu", precision.autocast, enabled=precision.autocast is not None):
        heads = heads_of(model(images))
    wide = torch.promote_types(precision.parameters, torch.float32)
    sum(F.cross_entropy(logits.to(wide), labels) for logits in heads).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"images": images.grad}


@functools.cache
def exact_gradients(name: str, start: torch.dtype) -> dict[str, Tensor]:
    return gradients(build(name), Precision(torch.float64), start=start)


@functools.cache
def stock_gradients(name: str, precision: Precision) -> dict[str, Tensor]:
    return gradients(build(name), precision, start=precision.parameters)


def without_key_bias(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's packed bias as the query's and the value's; the key's left out."""
    split = {}
    for name, gradient in found.items():
        if name.endswith("qkv.bias"):
            split[f"{name}, query"], _, split[f"{name}, value"] = gradient.chunk(3)
        elif not name.endswith("k_proj.bias"):
            split[name] = gradient
    return split


def query_and_key_bias(found: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    packed = [gradient.chunk(3)[:2] for name, gradient in found.items() if name.endswith("qkv.bias")]
    apart = [
        (found[name.replace("k_proj", "q_proj")], gradient)
        for name, gradient in found.items()
        if name.endswith("k_proj.bias")
    ]
    return packed + apart


def assert_gradients_as_accurate_as_stock(name: str, precision: Precision, memory: str) -> None:
    exact = exact_gradients(name, precision.parameters)
    stock = stock_gradients(name, precision)
    model = build(name)
    assert not swap(model, memory=memory).kept
    ours = gradients(model, precision, start=precision.parameters)
    assert ours.keys() == stock.keys() == exact.keys()

    mine, theirs, truth = (without_key_bias(found) for found in (ours, stock, exact))
    for parameter in truth:
        assert_as_accurate_as_stock(
            mine[parameter], theirs[parameter], truth[parameter], precision.parameters, name=f"{name}: {parameter}"
        )
    eps = torch.finfo(precision.autocast or precision.parameters).eps
    for query, key in query_and_key_bias(ours):
        assert key.abs().max() <= KEY_BIAS_EPS * eps * query.abs().max()


@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [*TIMM, *TRANSFORMERS])
def test_every_gradient_is_as_accurate_as_stocks(name: str, precision: str, memory: str) -> None:
    assert_gradients_as_accurate_as_stock(name, PRECISIONS[precision], memory)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "memory"), [("timm Ti distilled, LayerScale", "balanced"), ("transformers Ti distilled", "low")]
)
def test_every_gradient_of_the_kernels_is_as_accurate_as_stocks(
    name: str, precision: str, memory: str, triton_backend
) -> None:
    assert_gradients_as_accurate_as_stock(name, PRECISIONS[precision], memory)


def test_the_masks_compared_do_drop_something() -> None:
    model, dropped = build("timm Ti"), []
    for block in model.blocks:
        for drop_path in (block.drop_path1, block.drop_path2):
            drop_path.register_forward_hook(lambda _, __, out: dropped.append((out == 0).flatten(1).all(1).any()))
    gradients(model, PRECISIONS["float32"], start=torch.float32)
    assert any(dropped)
