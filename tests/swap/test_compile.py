"""torch.compile of swapped models in training: one graph, compiled once, and stock's values."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from deit_fast.swap import swap
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls, randomise

pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from tests.swap.original_models import DeiT3  # noqa: E402

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def images() -> Tensor:
    return torch.randn(6, 3, 32, 32)


def hugging_face(class_name: str) -> nn.Module:
    config = transformers.DeiTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32,
        patch_size=16, num_labels=10,
    )  # fmt: skip
    return randomise(getattr(transformers, class_name)(config))


def step(call, model: nn.Module, x: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    torch.manual_seed(seed)
    out = call(x)
    out = out if isinstance(out, Tensor) else out.logits
    found = gradients(model, (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum())
    return out.detach(), found, torch.rand(1)


def assert_compiled_steps_follow(model: nn.Module, expected: list[tuple], backend: str = "aot_eager") -> None:
    """Steps as the `expected` ones, in one graph that is compiled once."""
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed, (out, stock, after) in enumerate(expected):
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            result, found, rest = step(compiled, model, x_of(seed), seed)
        assert_close(result, out)
        assert_same_gradients(found, stock)
        assert torch.equal(rest, after)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def x_of(seed: int) -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("memory", ["balanced", "low"])
@pytest.mark.parametrize("kind", [VisionTransformer, VisionTransformerDistilled])
def test_training_with_drop_path_is_one_graph(kind, memory) -> None:
    model = randomise(kind(drop_path_rate=0.5, **SIZES)).train()
    expected = [step(model, model, x_of(seed), seed) for seed in range(3)]
    swap(model, memory=memory)
    assert operator_calls(lambda: model(images()))["keep_samples"]
    assert_compiled_steps_follow(model, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("class_name", ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"])
def test_a_transformers_classifier_is_one_graph(class_name, training) -> None:
    model = hugging_face(class_name).train(training)
    expected = [step(model, model, x_of(seed), seed) for seed in range(3)]
    swap(model)
    assert operator_calls(lambda: model(images()))["readout_attention"] == 1
    assert_compiled_steps_follow(model, expected)
    # The flag is gone also where a graph set it.
    assert model.deit(images()).last_hidden_state.shape[1] == 6


def test_a_model_of_the_original_repository_is_one_graph() -> None:
    model = randomise(DeiT3(drop_path=0.5)).train()
    expected = [step(model, model, x_of(seed), seed) for seed in range(3)]
    swap(model)
    assert operator_calls(lambda: model(images()))["readout_attention"] == 1
    assert_compiled_steps_follow(model, expected)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_inductor_reads_every_result_as_it_lies_in_memory(kind) -> None:
    """It asserts the strides that shape functions gave it."""
    if kind == "timm":
        model = randomise(VisionTransformerDistilled(drop_path_rate=0.5, **SIZES)).train()
    else:
        model = hugging_face("DeiTForImageClassification").train()
    # No caches: their keys leave out ATEN_CPU_CAPABILITY, which the code in them was made for.
    with torch._inductor.config.patch(fallback_random=True, force_disable_caches=True):
        expected = [step(model, model, x_of(seed), seed) for seed in range(2)]
        swap(model)
        assert_compiled_steps_follow(model, expected, backend="inductor")


def test_the_compiled_graph_has_the_readout() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    for model in (VisionTransformer(**SIZES), hugging_face("DeiTForImageClassification")):
        swap(model.eval())
        torch.compile(model, fullgraph=True, backend=backend)(images())
    assert sum("readout_attention" in target for target in seen) == 2


def test_one_dynamic_graph_serves_every_batch_size() -> None:
    model = randomise(VisionTransformer(drop_path_rate=0.5, **SIZES)).train()
    swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for seed, batch in enumerate((6, 4, 9)):
        x = torch.randn(batch, 3, 32, 32)
        expected, expected_gradients, _ = step(model, model, x, seed)
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            out, found, _ = step(compiled, model, x, seed)
        assert_close(out, expected)
        assert_same_gradients(found, expected_gradients)
