"""A model as a function of its parameters: stateless calls, ensembles, each sample's gradients, all derivatives."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

pytest.importorskip("timm")
from timm.layers import DropPath

import deit_fast
from tests.swap import transformers_models
from tests.swap.helpers import gradients
from tests.swap.situations import assert_same, ran, report_in

# PyTorch has no batching rule for its fused attention on a CPU, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_a_stateless_call_uses_the_parameters_given(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        others = {name: (1.1 * p).requires_grad_() for name, p in parameters_of(model).items()}
        logits = functional_call(model, others, (x,))
        return [logits, *torch.autograd.grad(logits.square().sum(), list(others.values()))]

    assert ran(report_in(situation, chosen)) == "whole"


def test_an_ensemble_is_computed_by_vmap() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.05)
        state = torch.func.stack_module_state([model, other])
        skeleton = copy.deepcopy(model).to("meta")
        return [torch.vmap(lambda *state: functional_call(skeleton, state, (x,)))(*state)]

    report_in(situation)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_gradients_of_each_sample_are_stocks(rate: float) -> None:
    """With stochastic depth each sample draws by itself (`randomness="different"`)."""

    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        for block in model.train().blocks:
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)

        def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
            return functional_call(model, parameters, (image[None],)).square().sum()

        each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
        return list(each(parameters_of(model), torch.cat([x] * 3)).values())

    assert ran(report_in(situation)) == "whole"


def test_images_may_be_mapped_one_by_one() -> None:
    assert ran(report_in(lambda model, x: [torch.vmap(model)(x[:, None])])) == "whole"


@pytest.mark.parametrize("chosen", [None, "torch"])
@pytest.mark.parametrize("by", ["autograd", "vmap"])
def test_batched_gradients_of_a_whole_model_are_stocks(by: str, chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        logits, inputs = model(x.requires_grad_())[0], [x, *model.parameters()]
        if by == "autograd":
            return list(torch.autograd.grad(logits, inputs, torch.eye(10), is_grads_batched=True))
        one = lambda grad: torch.autograd.grad(logits, inputs, grad, retain_graph=True)  # noqa: E731
        return list(torch.vmap(one)(torch.eye(10)))

    assert ran(report_in(situation, chosen)) == "whole"


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_batched_gradients_of_a_transformers_model_are_stocks(chosen: str | None) -> None:
    pytest.importorskip("transformers")
    model, x = transformers_models.build(), transformers_models.pixels()
    swapped = copy.deepcopy(model)
    deit_fast.swap(swapped)
    found = []
    with deit_fast.ops.backend.forced(chosen):
        for each in (swapped, model):
            inputs = [p for name, p in each.named_parameters() if "k_proj.bias" not in name]
            grads = torch.eye(10).view(10, 1, 10).expand(-1, 2, -1)
            found.append(torch.autograd.grad(each(x).logits, inputs, grads, is_grads_batched=True))
    assert_same(*map(list, found))
    assert ran(deit_fast.report(swapped)) == "whole"


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_a_product_with_the_hessian_is_stocks(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        parameters = list(model.blocks[1].parameters())
        with sdpa_kernel(SDPBackend.MATH):
            found = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
            return list(torch.autograd.grad(sum(g.square().sum() for g in found), parameters))

    assert ran(report_in(situation, chosen)) == "whole"


def test_jacobians_by_either_mode_are_stocks() -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        parameters = parameters_of(model)

        def logits(bias: Tensor) -> Tensor:
            return functional_call(model, {**parameters, "norm.bias": bias}, (x,))

        bias = parameters["norm.bias"]
        with sdpa_kernel(SDPBackend.MATH):
            return [torch.func.jacrev(logits)(bias), torch.func.jacfwd(logits)(bias)]

    assert ran(report_in(situation)) == "whole"


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_a_graph_is_walked_twice_and_two_graphs_once(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        loss = (model(x) * model(x.flip(-1))).sum()
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters()]
        twice = gradients(model, loss)
        return [*once, *twice.values()]

    assert ran(report_in(situation, chosen)) == "whole"


@pytest.mark.parametrize("chosen", [None, "torch"])
def test_a_batch_of_no_images_has_stocks_gradients(chosen: str | None) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        logits = model(x[:0])
        return [logits, *gradients(model, logits.sum()).values()]

    assert ran(report_in(situation, chosen)) == "whole"


REFUSED = {
    "one channel": lambda x: x[:, :1],
    "other sides": lambda x: x[..., :32],
    "no batch": lambda x: x[0],
    "another dtype": lambda x: x.double(),
    "integers": lambda x: x.to(torch.uint8),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_images_that_stock_refuses_get_its_error(wrong: str) -> None:
    def situation(model: nn.Module, x: Tensor) -> list[Tensor]:
        with pytest.raises((RuntimeError, AssertionError, ValueError)) as refusal:
            model(REFUSED[wrong](x))
        said.append((refusal.type, str(refusal.value)))
        return []

    said: list[tuple[type, str]] = []
    report_in(situation)
    assert said[0] == said[1]
