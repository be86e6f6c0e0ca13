"""`deit_fast.graph` through a stand-in for CUDA's graphs, which records its launches and runs them again."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import deit_fast
from deit_fast.kernels.launching import run
from deit_fast.runtime.graph import GraphedModel
from tests.swap.helpers import randomise

CPU = torch.device("cpu")
SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 10}


class Stream:
    def wait_stream(self, other: "Stream") -> None: ...


class Graphs:
    """What a capture ran, a replay runs again: on the tensors that were there then, whatever mode is on by now.

    calls: (whether within a capture, whether grad mode was on) of each forward pass. streams: the current one last.
    """

    def __init__(self, model: nn.Module, monkeypatch) -> None:
        self.model, self.calls, self.capturing, self.replays = model, [], False, 0
        self.streams, self.captures = [Stream()], []
        for name, stand_in in {
            "Stream": Stream,
            "current_stream": lambda: self.streams[-1],
            "stream": self.stream,
            "device": self.nothing,
            "synchronize": lambda device: None,
            "CUDAGraph": lambda: self.Graph(self),
            "graph": self.capture,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        forward = type(model).forward

        def noted(module, images):
            if not self.replaying:
                self.calls.append((self.capturing, torch.is_grad_enabled()))
            output = forward(module, images)
            self.last = images, output
            return output

        self.replaying = False
        monkeypatch.setattr(type(model), "forward", noted)

    class Graph:
        def __init__(self, graphs: "Graphs") -> None:
            self.graphs = graphs

        def replay(self) -> None:
            graphs = self.graphs
            graphs.replays += 1
            graphs.replaying = True
            with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", self.dtype, self.autocast):
                again = torch.func.functional_call(graphs.model, self.weights, self.images)
            graphs.replaying = False
            for output, value in zip(tree_leaves(self.output), tree_leaves(again), strict=True):
                if isinstance(output, torch.Tensor):
                    # As a kernel writes, whatever mode is on.
                    with torch.inference_mode(output.is_inference()):
                        output.copy_(value)

    @contextmanager
    def capture(self, graph: "Graphs.Graph", stream: Stream | None = None, capture_error_mode: str = "global"):
        self.streams.append(stream)
        graph.stream, graph.error_mode = stream, capture_error_mode
        self.captures.append(graph)
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        # Where the capture has failed, PyTorch's own does not come so far either.
        self.streams.pop()
        graph.images, graph.output = self.last
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        graph.weights = {name: tensor.detach() for name, tensor in tensors}
        graph.dtype, graph.autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

    @contextmanager
    def stream(self, stream: Stream):
        before = list(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams = before

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


@pytest.mark.parametrize("first", [True, False])
def test_graphs_made_in_inference_mode_run_outside_of_it_and_the_other_way_round(model, graphs, first):
    graphed = GraphedModel(model, torch.float32, CPU)
    for inference in (first, not first):
        with torch.inference_mode(inference):
            output = graphed(torch.full((2, 3, 4, 4), 1.0 + inference))
        assert output.tolist() == [48.0 * (1 + inference)] * 2 and output.is_inference() == inference
    assert len(graphs.captures) == 1


class Cast(nn.Module):
    """Notes whether autocast would keep the weight that it casts."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.kept = nn.Linear(4, 2), []

    def forward(self, images):
        self.kept.append(torch.is_autocast_cache_enabled())
        return self.head(images.mean((1, 2)))


def test_autocast_keeps_nothing_of_a_capture_and_each_of_its_dtypes_has_a_graph(monkeypatch):
    model, images = Cast().eval(), torch.randn(2, 3, 4, 4)
    graphs, graphed = Graphs(model, monkeypatch), GraphedModel(model, torch.float32, CPU)
    for _ in range(2):
        for enabled, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (True, torch.float16)):
            with torch.autocast("cpu", dtype, enabled):
                assert graphed(images).dtype == (dtype if enabled else torch.float32)
                assert torch.is_autocast_cache_enabled()
    assert len(graphs.captures) == 3 and not any(model.kept[:4])


def test_another_precision_of_float32_products_has_another_graph(model, graphs, monkeypatch):
    graphed, images = GraphedModel(model, torch.float32, CPU), torch.ones(2, 3, 4, 4)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            graphed(images)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(graphs.captures) == 2


def give_a_parameter(model):
    model.head.weight = nn.Parameter(torch.full_like(model.head.weight, 0.5))


def give_data(model):
    model.head.weight.data = torch.full_like(model.head.weight, 0.5)


def assign_a_state(model):
    model.load_state_dict({n: torch.full_like(t, 0.5) for n, t in model.state_dict().items()}, assign=True)


def give_a_head(model):
    model.head = nn.Linear(4, 2).eval()


def add_a_part(model):
    model.head = nn.Sequential(model.head, nn.GELU())


def drop_out(model):
    model.drop.train()


@pytest.mark.parametrize("change", [give_a_parameter, give_data, assign_a_state, give_a_head, add_a_part, drop_out])
def test_weights_elsewhere_other_parts_and_modes_are_captured_anew(change, monkeypatch):
    model = Cast().eval()
    model.drop = nn.Dropout().eval()
    graphs, graphed = Graphs(model, monkeypatch), GraphedModel(model, torch.float32, CPU)
    batches = [torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)]
    for images in batches:
        graphed(images)
    change(model)
    for _ in range(2):
        for images in batches:
            assert torch.allclose(graphed(images), model.head(images.mean((1, 2))))
    assert len(graphs.captures) == 4


def test_the_memory_of_a_captured_weight_is_nobody_elses(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    graphed(torch.ones(2, 3, 4, 4))
    memory = StorageWeakRef(model.scale.untyped_storage())
    # CUDA's graph holds an address alone.
    graphs.captures[0].weights.clear()
    model.scale.data = torch.full((1,), 2.0)
    assert not memory.expired()
    assert graphed(torch.ones(2, 3, 4, 4)).tolist() == [96.0, 96.0]


def test_a_capture_that_fails_leaves_the_stream_as_it_was_and_no_graph(model, graphs, monkeypatch):
    forward = type(model).forward

    def failing(module, images):
        if graphs.capturing:
            raise RuntimeError("not within a capture")
        return forward(module, images)

    graphed, streams = GraphedModel(model, torch.float32, CPU), list(graphs.streams)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", failing)
        with pytest.raises(RuntimeError, match="not within a capture"):
            graphed(torch.ones(2, 3, 4, 4))
    assert graphs.streams == streams and graphs.replays == 0
    assert graphed(torch.ones(2, 3, 4, 4)).tolist() == [48.0, 48.0]


def test_every_capture_has_a_stream_of_its_own_and_leaves_other_threads_alone(model, graphs):
    for _ in range(2):
        graphed = GraphedModel(model, torch.float32, CPU)
        for batch in (2, 3):
            graphed(torch.ones(batch, 3, 4, 4))
    assert len({graph.stream for graph in graphs.captures}) == 4
    assert {graph.error_mode for graph in graphs.captures} == {"thread_local"}


def test_no_images_need_no_graph(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    assert graphed(torch.ones(0, 3, 4, 4)).shape == (0,) and not graphs.captures


def test_images_may_lie_in_memory_in_another_way_than_those_captured(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    images = torch.randn(2, 3, 4, 4)
    for layout in (images, images.contiguous(memory_format=torch.channels_last), images.mT.contiguous().mT):
        assert torch.allclose(graphed(layout), images.sum((1, 2, 3)))
    assert len(graphs.captures) == 1


def test_threads_get_the_answers_to_their_own_images(model, graphs, monkeypatch):
    graphed = GraphedModel(model, torch.float32, CPU)
    graphed(torch.ones(2, 3, 4, 4))
    replay = Graphs.Graph.replay

    def slow(graph) -> None:
        time.sleep(0.01)
        replay(graph)

    monkeypatch.setattr(Graphs.Graph, "replay", slow)
    with ThreadPoolExecutor(4) as threads:
        outputs = list(threads.map(lambda value: graphed(torch.full((2, 3, 4, 4), float(value))), range(8)))
    assert [output[0].item() for output in outputs] == [48.0 * value for value in range(8)]


class Boxed:
    def __init__(self, logits) -> None:
        self.logits = logits


class Returns(Model):
    def forward(self, images):
        return self.box(super().forward(images))


@pytest.mark.parametrize("box", ["a dict", "a ModelOutput"])
def test_results_in_containers_are_copies_too(box, monkeypatch):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    model = Returns().eval()
    model.box = {
        "a dict": lambda logits: {"logits": logits, "loss": None, "kind": "logits"},
        "a ModelOutput": lambda logits: outputs.ImageClassifierOutput(logits=logits),
    }[box]
    Graphs(model, monkeypatch)
    graphed = GraphedModel(model, torch.float32, CPU)
    first = graphed(torch.ones(2, 3, 4, 4))
    graphed(torch.zeros(2, 3, 4, 4))
    assert type(first) is type(model.box(None)) and first["logits"].tolist() == [48.0, 48.0]
    assert first.get("loss") is None and first.get("kind") in (None, "logits")


def test_a_result_that_cannot_be_copied_is_an_error(monkeypatch):
    model = Returns().eval()
    model.box = Boxed
    Graphs(model, monkeypatch)
    with pytest.raises(TypeError, match="returns a Boxed, which can't be copied"):
        GraphedModel(model, torch.float32, CPU)(torch.ones(2, 3, 4, 4))


def test_images_that_want_a_gradient_are_an_error(model, graphs):
    graphed = GraphedModel(model, torch.float32, CPU)
    images = torch.ones(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="no gradients are computed"):
        graphed(images)
    with torch.no_grad():
        graphed(images)
    assert not graphed(images.detach()).requires_grad


def test_images_without_memory_of_their_own_are_an_error(model, graphs):
    images = TwoTensor(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4))
    with pytest.raises(TypeError, match="memory of their own, got a TwoTensor"):
        GraphedModel(model, torch.float32, CPU)(images)


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
    graphs, captured, launch = Graphs(swapped, monkeypatch), set(), run._run

    def noted(kernel, *rest) -> None:
        if graphs.capturing:
            captured.add(kernel.fn.__name__)
        launch(kernel, *rest)

    monkeypatch.setattr(run, "_run", noted)
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
