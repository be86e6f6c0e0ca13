"""`deit_fast.graph` through a stand-in for CUDA's graphs, which records its launches and runs them again."""

from contextlib import contextmanager

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn

import deit_fast
from deit_fast.kernels import launch
from deit_fast.runtime.graph import GraphedModel
from tests.swap.helpers import randomise

CPU = torch.device("cpu")
SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 10}


class Stream:
    def wait_stream(self, other: "Stream") -> None: ...


class Graphs:
    """`captured` holds what a capture ran; a replay runs it again and writes into the captured output."""

    def __init__(self, model: nn.Module, monkeypatch) -> None:
        self.model, self.calls, self.capturing, self.replays = model, [], False, 0
        for name, stand_in in {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": self.nothing,
            "device": self.nothing,
            "CUDAGraph": lambda: self.Graph(self),
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        forward = type(model).forward

        def noted(module, images):
            output = forward(module, images)
            self.calls.append((self.capturing, torch.is_grad_enabled()))
            self.last = images, output
            return output

        monkeypatch.setattr(type(model), "forward", noted)
        self.forward = forward

    class Graph:
        def __init__(self, graphs: "Graphs") -> None:
            self.graphs = graphs

        def replay(self) -> None:
            images, output = self.tensors
            self.graphs.replays += 1
            with torch.no_grad():
                output.copy_(self.graphs.forward(self.graphs.model, images))

    @contextmanager
    def capture(self, graph: "Graphs.Graph"):
        self.capturing = True
        yield
        self.capturing = False
        graph.tensors = self.last

    @contextmanager
    def nothing(self, *_):
        yield


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return images.sum((1, 2, 3)) * self.scale


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def graphs(model, monkeypatch) -> Graphs:
    return Graphs(model, monkeypatch)


def test_each_shape_is_captured_once_after_warming_up_and_then_replayed(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    for batch in (2, 2, 3, 2):
        images = torch.randn(batch, 3, 4, 4)
        assert torch.allclose(graphed(images), images.sum((1, 2, 3)))
    assert graphs.calls == [*[(False, False)] * 3, (True, False)] * 2
    assert graphs.replays == 4


def test_a_result_is_not_changed_by_the_next_call(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    first = graphed(torch.ones(2, 3, 4, 4))
    graphed(torch.zeros(2, 3, 4, 4))
    assert first.tolist() == [48.0, 48.0]


def test_a_changed_weight_counts(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    graphed(torch.ones(2, 3, 4, 4))
    with torch.no_grad():
        model.scale.fill_(2.0)
    assert graphed(torch.ones(2, 3, 4, 4)).tolist() == [96.0, 96.0]


def test_what_a_graph_cannot_do_is_an_error(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    with pytest.raises(TypeError, match=r"captured for torch.float32, got torch.float16"):
        graphed(torch.zeros(2, 3, 4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="captured on cpu, got images on meta"):
        graphed(torch.zeros(2, 3, 4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        model.train()
        graphed(torch.zeros(2, 3, 4, 4))
    assert graphs.calls == []


def test_without_a_gpu_it_is_an_error(model):
    with pytest.raises(ValueError, match="CUDA graphs need a GPU, the example is on cpu"):
        deit_fast.graph(model, torch.zeros(2, 3, 4, 4))


class OnGpu(torch.Tensor):
    """Says so, and lies on the CPU."""

    device = torch.device("cuda")


def test_the_example_is_captured_and_sets_dtype_and_device(model, graphs):
    graphed = deit_fast.graph(model, torch.zeros(2, 3, 4, 4).as_subclass(OnGpu))
    assert (graphed.dtype, graphed.device) == (torch.float32, torch.device("cuda"))
    assert graphs.calls == [*[(False, False)] * 3, (True, False)]
    images = torch.randn(2, 3, 4, 4).as_subclass(OnGpu)
    assert torch.allclose(graphed(images), images.sum((1, 2, 3)))
    assert len(graphs.calls) == 4


def test_a_swapped_classifiers_graphs_hold_its_kernels_and_follow_its_weights(monkeypatch, triton_backend):
    stock, swapped = (randomise(VisionTransformerDistilled(**SIZES)).eval() for _ in range(2))
    deit_fast.swap(swapped)
    graphs, captured, run = Graphs(swapped, monkeypatch), set(), launch._run

    def noted(kernel, *rest) -> None:
        if graphs.capturing:
            captured.add(kernel.fn.__name__)
        run(kernel, *rest)

    monkeypatch.setattr(launch, "_run", noted)
    graphed = GraphedModel(swapped, torch.float32, CPU)
    for batch in (1, 3, 1):
        images = torch.randn(batch, 3, 32, 32)
        with torch.no_grad():
            for model in (stock, swapped):
                for changed in (model.blocks[0].mlp.fc1, model.blocks[-1].attn.qkv):
                    changed.weight.mul_(1.5)
            torch.testing.assert_close(graphed(images), stock(images), rtol=1e-4, atol=1e-4)
    assert {"attention_kernel", "readout_kernel"} <= captured
    assert graphs.calls == [*[(False, False)] * 3, (True, False)] * 2 and graphs.replays == 3


def test_reduce_overhead_takes_a_swapped_models_training_steps_as_one_graph():
    """As far as a CPU shows: what is not broken off can be captured."""
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = randomise(VisionTransformerDistilled(drop_path_rate=0.5, **SIZES)).train()
    deit_fast.swap(model)
    compiled = torch.compile(model, mode="reduce-overhead")
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([1, 2, 3, 4])
    for step in range(2):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = nn.functional.cross_entropy(compiled(images), labels)
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad
        model.zero_grad()
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
