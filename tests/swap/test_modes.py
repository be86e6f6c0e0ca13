"""A swapped model under PyTorch's modes: those that change what is computed are obeyed, the others cost nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("timm")

import deit_fast
from tests.swap.situations import images, logits_and_gradients, ran, report_in, vit


class Replacing(TorchFunctionMode):
    """As NNCF, Brevitas and context parallelism put their own in the place of torch's functions."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return result * 0.9 if function is self.function else result


FUNCTIONS = [F.linear, F.layer_norm, F.gelu, F.scaled_dot_product_attention]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_function_mode_is_obeyed(function: Callable) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        with Replacing(function):
            replaced = model(x)
        assert not torch.allclose(replaced, model(x), atol=1e-3)
        return [replaced]

    report = report_in(situation)
    assert set(report.stock.values()) == {"a TorchFunctionMode is active"}


def test_a_function_mode_is_obeyed_by_a_compiled_model() -> None:
    model, x = vit(), images()
    with Replacing(F.linear):
        expected = model(x)
    plain = model(x)
    deit_fast.swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), plain, rtol=1e-4, atol=1e-4)
    with Replacing(F.linear):
        torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("cpu")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CONTEXTS = {
    "a default device": default_device,
    "a device's block": partial(torch.device, "meta"),
    "anomaly detection": torch.autograd.detect_anomaly,
    "activations kept elsewhere": save_on_cpu,
    "activations packed": lambda: saved_tensors_hooks(torch.clone, torch.clone),
    "deterministic algorithms": deterministic,
    "autocast without a cache": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    "plain attention": lambda: sdpa_kernel(SDPBackend.MATH),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("chosen", [None, "torch"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_a_mode_that_changes_no_function_runs_on_the_operators(name: str, chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        with CONTEXTS[name]():
            logits = model.train()(x)
        if name != "autocast without a cache":
            return [logits, *logits_and_gradients(model, x)]
        return [logits]

    assert ran(report_in(situation, chosen)) == "whole"


def test_a_fake_batch_runs_on_the_operators() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            shape = model(mode.from_tensor(x)).shape
        return [torch.zeros(shape)]

    assert ran(report_in(situation)) == "whole"


def test_counted_operations_are_stocks_where_the_last_block_is_whole() -> None:
    model, x = vit(), images()
    totals = []
    for prepare in (lambda: None, lambda: deit_fast.swap(model, readout=False)):
        prepare()
        # PyTorch has no count for its fused attention on a CPU.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(x)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1]


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_selective_checkpoints_change_no_gradient(chosen: str | None) -> None:
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, products)

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        def selective(images: Tensor) -> Tensor:
            tokens = model._pos_embed(model.patch_embed(images))
            for block in model.blocks:
                tokens = checkpoint(block, tokens, use_reentrant=False, context_fn=contexts)
            return model.forward_head(model.norm(tokens))

        logits = selective(x)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    assert ran(report_in(situation, chosen)) == "whole"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_whole_model_may_be_checkpointed(use_reentrant: bool) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        logits = checkpoint(model.train(), x.requires_grad_(), use_reentrant=use_reentrant)
        logits.square().sum().backward()
        return [logits, x.grad, *(p.grad for p in model.parameters())]

    assert ran(report_in(situation)) == "whole"


def test_timms_checkpoint_function_may_be_replaced(monkeypatch) -> None:
    """As DeepSpeed and XLA have checkpoints of their own."""
    from timm.models import vision_transformer

    theirs = vision_transformer.checkpoint_seq
    monkeypatch.setattr(vision_transformer, "checkpoint_seq", lambda blocks, x: theirs(blocks, x).sin())

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.set_grad_checkpointing()
        return logits_and_gradients(model.train(), x)

    assert report_in(situation).stock[""] == "timm's checkpoint_seq was replaced"
