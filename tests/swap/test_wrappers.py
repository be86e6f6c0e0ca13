"""Classes and forwards that other libraries put in front of a module's own, before the swap and after it."""

import copy
from collections.abc import Iterator
from types import MethodType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deit_fast.swap import restore, swap
from tests.swap.helpers import assert_close, block_calls, operator_calls, randomise

timm = pytest.importorskip("timm")
from timm.layers import LayerNorm  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402


def vit() -> nn.Module:
    return randomise(timm.create_model("deit_tiny_patch16_224", depth=2, img_size=32, num_classes=10)).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


# parametrize ------------------------------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def parametrized(model: nn.Module) -> nn.Module:
    """Two norms and a linear; each makes its block's fused path impossible."""
    parametrize.register_parametrization(model.norm, "weight", Doubled())
    parametrize.register_parametrization(model.blocks[0].norm1, "bias", Doubled())
    parametrize.register_parametrization(model.blocks[1].mlp.fc1, "weight", Doubled())
    return model


@pytest.mark.parametrize("order", ["swap first", "parametrize first"])
def test_parametrizations_survive_swap_and_restore_in_both_orders(order: str) -> None:
    model, x = vit(), images()
    expected = parametrized(copy.deepcopy(model))(x)
    if order == "swap first":
        swap(model)
        parametrized(model)
    else:
        parametrized(model)
        report = swap(model)
        assert report.kept["blocks.0"] == "norm1 is a ParametrizedLayerNorm"
        assert "norm" in report.swapped and "blocks.0.norm1" in report.swapped
    assert_close(model(x), expected)
    # Block 0 by parts, and block 1 but for its MLP.
    assert operator_calls(lambda: model(x)) == {"patch_embed": 1, "layer_norm": 5, "linear": 6, "attention": 2}
    assert_close(copy.deepcopy(model)(x), expected)
    restore(model)
    assert torch.equal(model(x), expected)
    assert type(model.norm).__bases__ == (LayerNorm,) and type(model.blocks[0]) is Block


def test_a_parametrization_taken_off_while_swapped_leaves_the_swapped_class() -> None:
    model, x = parametrized(vit()), images()
    swap(model)
    for module, name in ((model.norm, "weight"), (model.blocks[0].norm1, "bias"), (model.blocks[1].mlp.fc1, "weight")):
        parametrize.remove_parametrizations(module, name)
    assert operator_calls(lambda: model(x)) == block_calls(2)
    swapped = model(x)
    restore(model)
    assert type(model.norm) is LayerNorm
    assert_close(swapped, model(x))


def test_a_parametrized_model_keeps_its_positions() -> None:
    model, x = vit(), images()
    parametrize.register_parametrization(model, "pos_embed", Doubled())
    expected = model(x)
    swap(model)
    assert_close(model(x), expected)
    assert operator_calls(lambda: model(x)) == block_calls(2)


# fully_shard and DistributedDataParallel ----------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("order", ["swap first", "shard first"])
def test_fully_sharded_models_are_swapped_and_restored_in_both_orders(process_group, order: str) -> None:
    from torch.distributed.fsdp import FSDPModule

    model, x = vit(), images()
    expected = model(x)
    gradient = torch.autograd.grad(expected.square().sum(), model.blocks[0].attn.qkv.weight)[0]
    if order == "swap first":
        swap(model)
        sharded(model)
    else:
        sharded(model)
        classes = [type(module) for module in model.modules()]
        report = swap(model)
        assert report.kept == {} and "blocks.1" in report.swapped
    assert type(model.blocks[0]) is type(model.blocks[1]), "torch.compile would see one class a block"
    assert_close(model(x), expected)
    assert operator_calls(lambda: model(x)) == block_calls(2, readout=False)
    model(x).square().sum().backward()
    torch.testing.assert_close(
        model.blocks[0].attn.qkv.weight.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item()
    )
    restore(model)
    assert isinstance(model.blocks[0], FSDPModule) and isinstance(model, FSDPModule)
    assert type(model.blocks[0]).__bases__ == (FSDPModule, Block)
    assert type(model).__bases__ == (FSDPModule, VisionTransformer)
    if order == "shard first":
        assert [type(module) for module in model.modules()] == classes
    assert_close(model(x), expected)
    assert not operator_calls(lambda: model(x))


class _AddOne(nn.Module):
    def forward(self, x):
        x += 1
        return x


def test_a_sharded_blocks_result_may_be_added_to_in_place(process_group) -> None:
    """Of a view autograd would drop the hook that gathers the weights for backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x, mesh, gradients = torch.randn(2, 5, vit().embed_dim), init_device_mesh("cpu", (1,)), []
    for change in (lambda model: model, swap):
        model = vit()
        change(model)
        blocks = nn.Sequential(model.blocks[0], _AddOne(), model.blocks[1])
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(blocks, mesh=mesh)(x).square().sum().backward()
        gradients.append(blocks[0].mlp.fc1.weight.grad.full_tensor())
    assert_close(*gradients)


def test_a_norm_sharded_by_itself_makes_its_block_step_aside(process_group) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = vit(), images()
    expected = model(x)
    fully_shard(model.blocks[0].norm2, mesh=init_device_mesh("cpu", (1,)))
    sharded(model)
    report = swap(model)
    assert report.kept["blocks.0"] == "norm2 is a FSDPLayerNorm"
    assert_close(model(x), expected)
    assert operator_calls(lambda: model(x)) == block_calls(1, readout=False, layer_norm=3, linear=4, attention=2)


def test_sharded_transformers_layers_checkpoint_once_when_swapped(process_group) -> None:
    transformers = pytest.importorskip("transformers")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model = randomise(transformers.ViTModel(transformers.ViTConfig(image_size=32, **options)))
    x = images()
    expected = model(x).last_hidden_state
    layer = fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (1,)))
    swap(model)
    assert operator_calls(lambda: model(x))["attention"] == 1
    checkpoints = []

    def run(function, *args):
        checkpoints.append(function)
        return function(*args)

    layer.gradient_checkpointing, layer._gradient_checkpointing_func = True, run
    assert_close(model.train()(x).last_hidden_state, expected)
    assert len(checkpoints) == 1
    restore(model)
    assert_close(model(x).last_hidden_state, expected)
    assert len(checkpoints) == 2


def test_a_model_inside_distributed_data_parallel_is_swapped(process_group) -> None:
    model, x = vit(), images()
    expected = model(x)
    parallel = nn.parallel.DistributedDataParallel(model)
    assert "module.blocks.0" in swap(parallel).swapped
    assert_close(parallel(x), expected)
    parallel(x).sum().backward()
    restore(parallel)
    assert torch.equal(parallel(x), expected)


# Forwards on the instance -------------------------------------------------------------------------------------------


def hooked(model: nn.Module, calls: list[str]) -> nn.Module:
    """Accelerate's hook on the model, a block and a norm."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Count(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    for module in (model, model.blocks[0], model.blocks[1].norm1):
        hooks.add_hook_to_module(module, Count())
    return model


@pytest.mark.parametrize("order", ["swap first", "hook first"])
def test_accelerate_hooks_work_in_both_orders(order: str) -> None:
    model, x, calls = vit(), images(), []
    expected = model(x)
    if order == "swap first":
        swap(model)
        hooked(model, calls)
    else:
        hooked(model, calls)
        report = swap(model)
        assert {"", "blocks.0", "blocks.1.norm1"} <= set(report.swapped)
        assert report.kept == {"blocks.1": "norm1 has a forward of its own on the instance"}
    assert_close(model(x), expected)
    assert calls == ["VisionTransformer", "Block", "LayerNorm"]
    assert operator_calls(lambda: model(x)) == block_calls(1, readout=False, layer_norm=3, linear=4, attention=2)
    restore(model)
    calls.clear()
    assert torch.equal(model(x), expected)
    assert calls == ["VisionTransformer", "Block", "LayerNorm"]


def test_a_model_that_accelerate_unhooked_is_swapped_and_restored() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model, x = hooked(vit(), []), images()
    expected = model(x)
    hooks.remove_hook_from_module(model, recurse=True)
    assert "forward" in model.blocks[0].__dict__
    swap(model)
    assert_close(model(x), expected)
    assert operator_calls(lambda: model(x)) == block_calls(2)
    restore(model)
    assert torch.equal(model(x), expected)


def test_a_forward_captured_while_swapped_runs_stock_after_restore() -> None:
    model, x = vit(), images()
    tokens = torch.randn(2, 5, 192)
    swap(model)
    features, block, norm = model.forward_features, model.blocks[0].forward, model.norm.forward
    mlp, attn, patches = model.blocks[0].mlp.forward, model.blocks[0].attn.forward, model.patch_embed.forward
    restore(model)
    assert torch.equal(features(x), model.forward_features(x))
    assert torch.equal(patches(x), model.patch_embed(x))
    for captured, module in ((block, model.blocks[0]), (norm, model.norm), (mlp, model.blocks[0].mlp)):
        assert torch.equal(captured(tokens), module(tokens))
    assert torch.equal(attn(tokens, is_causal=True), model.blocks[0].attn(tokens, is_causal=True))
    assert not operator_calls(lambda: block(tokens))


def test_a_transformers_forward_captured_while_swapped_runs_stock_after_restore() -> None:
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model, tokens = (
        transformers.DeiTModel(transformers.DeiTConfig(image_size=32, **options)).eval(),
        torch.rand(2, 5, 64),
    )
    swap(model)
    layer = model.layers[0]
    captured = [part.forward for part in (layer, layer.mlp, model.embeddings)]
    attention = layer.attention.forward
    restore(model)
    for forward, part, x in zip(
        captured, (layer, layer.mlp, model.embeddings), (tokens, tokens, images()), strict=True
    ):
        assert torch.equal(forward(x), part(x))
    assert torch.equal(attention(tokens)[0], layer.attention(tokens)[0])


def test_a_forward_that_another_library_put_on_a_module_is_reported_and_obeyed() -> None:
    model, x = vit(), images()

    def halved(self, tokens: Tensor, **kwargs) -> Tensor:
        return tokens / 2

    model.blocks[0].forward = MethodType(halved, model.blocks[0])
    model.blocks[1].attn.forward = MethodType(halved, model.blocks[1].attn)
    expected = model(x)
    report = swap(model)
    assert report.kept == {
        "blocks.0": "has a forward of its own on the instance",
        "blocks.1": "attn has a forward of its own on the instance",
        "blocks.1.attn": "has a forward of its own on the instance",
    }
    assert_close(model(x), expected)
    # Put on after the swap.
    model.blocks[1].mlp.forward = MethodType(halved, model.blocks[1].mlp)
    swapped = model(x)
    restore(model)
    assert_close(swapped, model(x))


def test_another_embedding_method_put_on_the_instance_is_obeyed() -> None:
    model, x = vit(), images()
    model._pos_embed = lambda tokens: VisionTransformer._pos_embed(model, tokens) * 0.5
    expected = model(x)
    report = swap(model)
    assert report.kept[""] == "has a _pos_embed of its own on the instance"
    assert_close(model(x), expected)
