"""Whoever changes a stock class is obeyed: ways of changing it × swapped classes × before and after the swap."""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deit_fast
from deit_fast.swap.rules import RULES, Rule
from tests.swap.helpers import assert_close, randomise

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from tests.swap.original_models import DeiT3  # noqa: E402


def of_timm(distilled: bool = False) -> nn.Module:
    name = f"deit_tiny_{'distilled_' if distilled else ''}patch16_224"
    options = {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 10}
    return randomise(timm.create_model(name, **options)).eval()


def of_transformers(name: str) -> nn.Module:
    family = name.removesuffix("WithTeacher").removesuffix("ForImageClassification")
    options = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    config = getattr(transformers, f"{family}Config")(image_size=64, num_labels=10, **options)
    return randomise(getattr(transformers, name)(config)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": of_timm,
    "timm distilled": lambda: of_timm(distilled=True),
    "DeiT": lambda: of_transformers("DeiTForImageClassification"),
    "DeiT with teacher": lambda: of_transformers("DeiTForImageClassificationWithTeacher"),
    "ViT": lambda: of_transformers("ViTForImageClassification"),
    "original": lambda: randomise(DeiT3()).eval(),
}


def swapped_classes() -> list[tuple[str, Rule]]:
    """Every model here with every rule that it meets, so that a new swapped class comes by itself."""
    found = []
    for name, build in MODELS.items():
        model = build()
        deit_fast.swap(model)
        rules = {RULES[type(module)].stock: RULES[type(module)] for module in model.modules() if type(module) in RULES}
        found += [(name, rule) for rule in rules.values()]
    return found


CLASSES = swapped_classes()


def test_every_registered_class_is_in_the_table() -> None:
    libraries = ("timm.", "transformers.", "torch.")
    registered = {rule.stock for rule in RULES.values() if rule.stock.__module__.startswith(libraries)}
    assert registered <= {rule.stock for _, rule in CLASSES}


def first_tensor(result) -> Tensor:
    if isinstance(result, Tensor):
        return result
    return result.logits if hasattr(result, "logits") else result[0]


def changed(result):
    """Twice a tensor, or twice the first of what is in a tuple or an output object."""
    if isinstance(result, Tensor):
        return 2 * result
    if hasattr(result, "logits"):
        result = copy.copy(result)
        result.logits = 2 * result.logits
        return result
    return 2 * result[0], *result[1:]


@contextmanager
def replaced(stock: type[nn.Module], name: str) -> Iterator[None]:
    """By a function that knows nothing of the old one but what it gives."""
    old = getattr(stock, name)
    with mock.patch.object(stock, name, lambda self, *args, **kwargs: changed(old(self, *args, **kwargs))):
        yield


@contextmanager
def wrapped(stock: type[nn.Module], name: str) -> Iterator[None]:
    """By a wrapper that takes over its names, as decorators do."""
    old = getattr(stock, name)

    @functools.wraps(old)
    def wrapper(self, *args, **kwargs):
        return changed(old(self, *args, **kwargs))

    with mock.patch.object(stock, name, wrapper):
        yield


@contextmanager
def with_another_signature(stock: type[nn.Module], name: str) -> Iterator[None]:
    old = getattr(stock, name)

    def other(self, *args, strength: float = 2.0, **kwargs):
        return changed(old(self, *args, **kwargs)) if strength == 2.0 else old(self, *args, **kwargs)

    with mock.patch.object(stock, name, other):
        yield


WAYS = [replaced, wrapped, with_another_signature]


def numbers(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return first_tensor(model(x))


def images(model: nn.Module) -> Tensor:
    return torch.randn(2, 3, 32, 32) if isinstance(model, DeiT3) else torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("name", "rule"), CLASSES, ids=[f"{name}-{rule.stock.__name__}" for name, rule in CLASSES])
def test_a_replaced_method_is_called_and_given_back(name, rule, way, before) -> None:
    model = MODELS[name]()
    stock, x = copy.deepcopy(model), images(model)
    plain = numbers(stock, x)
    for method in rule.methods:
        if not before:
            deit_fast.swap(model)
        with way(rule.stock, method):
            if before:
                report = deit_fast.swap(model)
                kept = {module for module, why in report.kept.items() if "was replaced" in why}
                assert any(isinstance(model.get_submodule(module), rule.stock) for module in kept)
            expected = numbers(stock, x)
            assert not torch.allclose(expected, plain, rtol=1e-2)
            assert_close(numbers(model, x), expected)
            assert any("replaced" in reason for reason in deit_fast.report(model).stock.values())
        assert_close(numbers(model, x), plain)
        deit_fast.restore(model)


PARTS = {
    nn.Linear: "timm", nn.Identity: "timm", nn.Dropout: "timm", nn.GELU: "timm", nn.Conv2d: "timm",
    timm.layers.LayerScale: "layer scale", nn.Sequential: "timm",
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_a_replaced_method_of_a_part_is_called(part) -> None:
    model = of_timm()
    if PARTS[part] == "layer scale":
        model = randomise(timm.create_model("deit3_small_patch16_224", img_size=64, depth=2, num_classes=10)).eval()
    stock, x = copy.deepcopy(model), images(model)
    deit_fast.swap(model)
    with replaced(part, "forward"):
        assert_close(numbers(model, x), numbers(stock, x))
    # A sequence has no operator of its own: it is called, and its blocks run on theirs.
    assert deit_fast.report(model).stock or part is nn.Sequential
    assert_close(numbers(model, x), numbers(stock, x))


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "linear", "gelu", "layer_norm"])
@pytest.mark.parametrize("build", [MODELS["timm"], MODELS["DeiT"]], ids=["timm", "transformers"])
def test_a_replaced_function_of_torch_is_called(build, name, monkeypatch) -> None:
    model = build()
    stock, x = copy.deepcopy(model), images(model)
    deit_fast.swap(model)
    old = getattr(F, name)
    monkeypatch.setattr(F, name, lambda *args, **kwargs: 1.5 * old(*args, **kwargs))
    assert_close(numbers(model, x), numbers(stock, x))
    report = deit_fast.report(model)
    # A classifier of transformers is stock's around its layers.
    assert report.stock and not any(calls.fused for name, calls in report.calls.items() if name)


@pytest.mark.parametrize("method", ["_pos_embed", "pool", "forward_head"])
@pytest.mark.parametrize("on", ["class", "instance"])
def test_a_replaced_helper_of_timms_model_is_called(method, on, monkeypatch) -> None:
    model = of_timm()
    stock, x = copy.deepcopy(model), images(model)
    deit_fast.swap(model)
    old = getattr(timm.models.vision_transformer.VisionTransformer, method)

    def other(self, tokens, *args, **kwargs):
        # Reads every row.
        return old(self, tokens + tokens.mean(1, keepdim=True), *args, **kwargs)

    for each in (model, stock):
        if on == "class":
            monkeypatch.setattr(timm.models.vision_transformer.VisionTransformer, method, other)
        else:
            monkeypatch.setattr(each, method, MethodType(other, each))
    assert_close(numbers(model, x), numbers(stock, x))
    report = deit_fast.report(model)
    assert report.stock.keys() == {""} and all(report.calls[f"blocks.{i}"].fused for i in range(len(model.blocks)))


def test_a_replaced_attention_is_called_in_a_compiled_model(monkeypatch) -> None:
    model = of_timm()
    stock, x = copy.deepcopy(model), images(model)
    deit_fast.swap(model)
    compiled = torch.compile(model, backend="eager")
    assert_close(numbers(compiled, x), numbers(stock, x))
    attention = timm.models.vision_transformer.Attention
    monkeypatch.setattr(attention, "forward", lambda self, x, **_: self.proj(self.qkv(x)[..., : x.shape[-1]]))
    assert_close(numbers(compiled, x), numbers(stock, x))
    torch.compiler.reset()


def test_what_was_replaced_before_this_library_was_imported_is_called() -> None:
    """By a function, and by what is none."""
    program = """
import copy, functools, timm, torch
from torch import nn
from timm.models.vision_transformer import Attention, Block

old = Attention.forward
Attention.forward = lambda self, *args, **kwargs: 2 * old(self, *args, **kwargs)
Block.forward = functools.partialmethod(Block.forward)
old_linear = nn.Linear.forward
nn.Linear.forward = lambda self, x: 1.5 * old_linear(self, x)
model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
stock, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)

import deit_fast
deit_fast.swap(model)
print(torch.allclose(model(x), stock(x), atol=1e-5), type(model.blocks[0].attn) is not Attention)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr
