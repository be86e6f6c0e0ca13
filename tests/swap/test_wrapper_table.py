"""Compilers and wrappers around a model, each in inference and training, in float32 and under bfloat16 autocast.

The model is swapped before it is wrapped, after that, or swapped, wrapped and restored; the control is stock in
the same wrapper. ONNX, AOTInductor and torchao's quantization are in test_export.py.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.nn.utils import parametrizations

import deit_fast
from deit_fast.nn import forward
from deit_fast.swap import restore, swap
from tests.swap.helpers import LoraLinear, randomise

timm = pytest.importorskip("timm")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
# Of the norm of what is compared. bfloat16 rounds to 2⁻⁹, and a swapped model rounds elsewhere.
FAR = {"float32": 2e-5, "autocast": 3e-2}
Call = Callable[[Tensor], Tensor]


_GRAPHS: list[torch.fx.GraphModule] = []


def noted(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
    """A compiler that keeps what it is given in _GRAPHS."""
    _GRAPHS.append(graph)
    return aot_eager(graph, inputs)


def compiled(model: nn.Module) -> Call:
    return torch.compile(model, backend=noted)


def compiled_whole(model: nn.Module) -> Call:
    return torch.compile(model, backend=noted, fullgraph=True)


def exported(model: nn.Module) -> Call:
    return torch.export.export(model, (X,)).module()


def data_parallel(model: nn.Module) -> Call:
    return nn.parallel.DistributedDataParallel(model)


def fully_sharded(model: nn.Module) -> Call:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def accelerated(model: nn.Module) -> Call:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(model)


def lightning(model: nn.Module) -> Call:
    module = pytest.importorskip("lightning").LightningModule()
    module.model = model
    module.forward = lambda x: module.model(x)
    return module


def peft(model: nn.Module) -> Call:
    library = pytest.importorskip("peft")
    torch.manual_seed(2)
    return library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=True))


def low_rank(model: nn.Module) -> Call:
    for block in model.blocks:
        torch.manual_seed(2)
        block.attn.qkv = LoraLinear(block.attn.qkv)
        # At its own size softmax would be a step, where rounding decides.
        block.attn.qkv.up.data *= 0.02
    return model


def averaged(model: nn.Module) -> Call:
    from timm.utils import ModelEmaV3

    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    return ema


def checkpointed(model: nn.Module) -> Call:
    model.set_grad_checkpointing()
    return model


def parametrized(model: nn.Module) -> Call:
    for block in model.blocks:
        parametrizations.weight_norm(block.attn.qkv)
    return model


WRAPPERS = {
    wrap.__name__: wrap
    for wrap in (
        compiled,
        compiled_whole,
        exported,
        data_parallel,
        fully_sharded,
        accelerated,
        lightning,
        peft,
        low_rank,
        averaged,
        checkpointed,
        parametrized,
    )
}
# An exported program and an averaged model are for inference.
TRAINED = [name for name in WRAPPERS if name not in ("exported", "averaged")]
ORDERS = ("swap, wrap", "wrap, swap", "swap, wrap, restore")


@pytest.fixture(scope="module", autouse=True)
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def vit(training: bool) -> nn.Module:
    model = timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32, embed_dim=96, num_heads=3, num_classes=10)
    return randomise(model).train(training)


def wrapped(name: str, model: nn.Module, order: str) -> Call:
    if order == "wrap, swap":
        call = WRAPPERS[name](model)
        swap(call if isinstance(call, nn.Module) and name != "exported" else model)
        return call
    if order != "stock":
        swap(model)
    call = WRAPPERS[name](model)
    if order == "swap, wrap, restore":
        restore(call if isinstance(call, nn.Module) and name != "exported" else model)
    return call


def ran_fused(name: str, call: Call, model: nn.Module) -> bool:
    """Whether anything that was swapped ran on the operators."""
    if name.startswith("compiled"):
        nodes = [node for graph in _GRAPHS for node in graph.graph.nodes]
        return any(forward.__file__ in (node.stack_trace or "") for node in nodes)
    ran = call.module if name == "averaged" else model
    return any(calls.fused for calls in deit_fast.report(ran).calls.values())


def numbers(name: str, order: str, training: bool, precision: str) -> list[Tensor]:
    """The logits; in training the gradients, too, in the order of the parameters."""
    _GRAPHS.clear()
    model = vit(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"), torch.set_grad_enabled(training):
        call = wrapped(name, model, order)
        logits = call(X)
    # Exported programs are stock's; what was restored has nothing swapped.
    assert ran_fused(name, call, model) == (order in ORDERS[:2] and name != "exported")
    if not training:
        return [logits.float()]
    logits.float().square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach().float(), *(getattr(grad, "full_tensor", lambda grad=grad: grad)() for grad in grads)]


_CONTROL: dict[tuple, list[Tensor]] = {}


def control(name: str, training: bool, precision: str) -> list[Tensor]:
    """Stock's numbers."""
    asked = name, training, precision
    if asked not in _CONTROL:
        _CONTROL[asked] = numbers(name, "stock", training, precision)
    return _CONTROL[asked]


@pytest.mark.parametrize("precision", FAR)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("name", "training"), [*((name, False) for name in WRAPPERS), *((name, True) for name in TRAINED)]
)
def test_a_wrapper_gives_stocks_numbers(name: str, order: str, training: bool, precision: str) -> None:
    torch._dynamo.reset()
    expected, exact = (control(name, training, each) for each in (precision, "float32"))
    found = numbers(name, order, training, precision)
    assert len(found) == len(expected)
    # To the whole's size: a key's bias has a gradient of rounding noise alone.
    size = max(tensor.norm().item() for tensor in expected[1:]) if training else 0.0
    for one, other, unrounded in zip(found, expected, exact, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        scale = max(other.norm().item(), 1e-3 * size)
        # Two roundings of one number may lie twice as far apart as either is from it.
        own = (other - unrounded).norm().item()
        assert (one - other).norm().item() <= max(FAR[precision] * scale, 2 * own)


def test_the_control_is_told_from_another_model() -> None:
    """The bound above is not met by a model that lacks a residual."""
    expected = numbers("checkpointed", "stock", False, "autocast")
    model = vit(False)
    model.blocks[1].ls2 = nn.Softplus()
    other = copy.deepcopy(model)(X).float()
    assert (other - expected[0]).norm() > 3 * FAR["autocast"] * expected[0].norm()
