"""Where parameters come from and where they lie: built without memory, loaded, offloaded, sharded, replicated."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("timm")
from timm.optim import param_groups_layer_decay
from timm.utils import ModelEmaV3

import deit_fast
from tests.swap.situations import assert_same, images, logits_and_gradients, ran, report_in, vit


def without_memory() -> nn.Module:
    """A swapped model that has not been given its weights."""
    with torch.device("meta"):
        model = vit()
    deit_fast.swap(model)
    return model


def emptied(model: nn.Module, stock: nn.Module, folder: Path) -> None:
    model.to_empty(device="cpu").load_state_dict(stock.state_dict())


def assigned(model: nn.Module, stock: nn.Module, folder: Path) -> None:
    model.load_state_dict(stock.state_dict(), assign=True)


def dispatched(model: nn.Module, stock: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.save(stock.state_dict(), folder / "weights.bin")
    accelerate.load_checkpoint_and_dispatch(model, str(folder / "weights.bin"), device_map={"": "cpu"})


def offloaded(model: nn.Module, stock: nn.Module, folder: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    assigned(model, stock, folder)
    accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.mark.parametrize("load", [emptied, assigned, dispatched, offloaded])
def test_a_model_built_without_memory_is_given_its_weights(load: Callable, tmp_path) -> None:
    stock, model, x = vit(), without_memory(), images()
    assert model(x.to("meta")).shape == (2, 10)
    load(model, stock, tmp_path)
    with torch.no_grad():
        assert_same([model.eval()(x)], [stock(x)])
    # Accelerate gives each linear its weights as that is called.
    assert ran(deit_fast.report(model)) == ("parts" if load is offloaded else "whole")


def test_plain_tensors_stand_in_parameters_places() -> None:
    """As quantizers and sharders set them."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        for block in model.blocks:
            weight = block.mlp.fc1.weight.detach()
            del block.mlp.fc1.weight
            block.mlp.fc1.weight = 1.1 * weight
        return logits_and_gradients(model, x)

    assert ran(report_in(situation)) == "whole"


def test_replicas_are_swapped_and_give_their_gradients_to_the_model() -> None:
    """As `nn.DataParallel` makes them: modules whose tensors are results, not parameters."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in replicas.items():
            for name, child in module._modules.items():
                setattr(replica, name, replicas[child] if child is not None else None)
            for name, parameter in module._parameters.items():
                replica._parameters.pop(name, None)
                setattr(replica, name, None if parameter is None else parameter.clone())
        logits = replicas[model](x)
        logits.square().sum().backward()
        reports.append(deit_fast.report(replicas[model]))
        return [logits, *(p.grad for p in model.parameters())]

    reports: list = []
    report_in(situation)
    assert ran(reports[1]) == "whole"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype_is_stocks(dtype: torch.dtype) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        model.to(dtype)
        for module in model.modules():
            # Norms are often kept in float32.
            if isinstance(module, nn.LayerNorm) and dtype is torch.bfloat16:
                module.float()
        return [model(x.to(dtype))]

    assert ran(report_in(situation)) == "whole"


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "one image seen often": lambda x: x[:1].expand(4, -1, -1, -1),
    "one channel seen thrice": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "mirrored and transposed": lambda x: x.flip(-1).transpose(2, 3),
    "every second channel": lambda x: torch.cat([x, x], 1)[:, ::2],
}


@pytest.mark.parametrize("chosen", [None, "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_may_lie_in_memory_as_they_like(layout: str, chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        x = LAYOUTS[layout](x).detach().requires_grad_()
        return [*logits_and_gradients(model.to(memory_format=torch.channels_last), x), x.grad]

    assert ran(report_in(situation, chosen)) == "whole"


def test_layer_decay_and_averaged_weights_follow_stock() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        groups = param_groups_layer_decay(model, 0.05, layer_decay=0.75)
        average, optimizer = ModelEmaV3(model, decay=0.9), torch.optim.SGD(groups, 1e-3)
        for _ in range(3):
            model.train()(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update(model)
        scales = torch.tensor([group["lr_scale"] for group in groups])
        return [scales, model.eval()(x), average.module.eval()(x)]

    assert ran(report_in(situation)) == "whole"


# Distributed tensors -----------------------------------------------------------------------------------------------


@pytest.fixture
def mesh(tmp_path) -> Iterator:
    if not dist.is_available():
        pytest.skip("torch is built without distributed")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_layers_in_tensor_parallel_are_called(mesh) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        for block in model.blocks:
            parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
        logits = model(x)
        logits.square().sum().backward()
        return [logits, *(getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters())]

    assert ran(report_in(situation)) == "parts"


def test_a_model_of_replicated_tensors_runs_as_stock(mesh) -> None:
    from torch.distributed.tensor import DTensor, Replicate, distribute_module

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        distribute_module(model, mesh)
        return [model(DTensor.from_local(x, mesh, [Replicate()])).full_tensor()]

    assert ran(report_in(situation)) == "stock"
