"""Derivatives beyond the first backward: of gradients, forward-mode, batched. The control is the stock forms alone."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit_fast import ops
from deit_fast.ops import backend
from deit_fast.ops.operator import OPERATORS
from tests.ops.test_dispatch import samples
from tests.support.examples import public, tensors

everywhere = pytest.mark.parametrize("chosen", [None, "torch", "triton"])
of_every_operator = pytest.mark.parametrize("name", samples(requires_grad=True))


def case(name: str) -> tuple[tuple, list[Tensor]]:
    """Arguments, and those among them that have a gradient."""
    torch.manual_seed(1)
    arguments = samples(requires_grad=True)[name]
    return arguments, [t for t in tensors(arguments) if t.requires_grad]


def loss_of(name: str, arguments: tuple) -> Tensor:
    """Of what is no data."""
    result = public(name)(*arguments)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    data = OPERATORS[name.partition(",")[0]].data_outputs
    return sum((t.sin() * t).sum() for i, t in enumerate(outputs) if i not in data)


def loss_at(name: str, arguments: tuple, inputs: list[Tensor], given: tuple[Tensor, ...]) -> Tensor:
    """With `given` in the places of `inputs`."""
    replaced = {id(old): new for old, new in zip(inputs, given, strict=True)}

    def placed(argument: object) -> object:
        return list(map(placed, argument)) if isinstance(argument, list) else replaced.get(id(argument), argument)

    return loss_of(name, tuple(map(placed, arguments)))


def assert_close(ours: Tensor, stock: Tensor) -> None:
    scale = stock.abs().max().item() or 1.0
    torch.testing.assert_close(ours / scale, stock / scale, rtol=0, atol=1e-4)


def stock_penalty(name: str) -> list[Tensor]:
    """Under torch.func the operators are their stock forms, none of whose backwards is ours."""
    arguments, inputs = case(name)
    every = tuple(range(len(inputs)))

    def loss(*given: Tensor) -> Tensor:
        return loss_at(name, arguments, inputs, given)

    def penalised(*given: Tensor) -> Tensor:
        return loss(*given) + sum(g.square().sum() for g in torch.func.grad(loss, argnums=every)(*given))

    with sdpa_kernel(SDPBackend.MATH):
        return list(torch.func.grad(penalised, argnums=every)(*(t.detach() for t in inputs)))


@everywhere
@of_every_operator
def test_a_gradient_penalty_has_stocks_gradients(name: str, chosen: str | None) -> None:
    arguments, inputs = case(name)
    # PyTorch's own fused attention has no second derivative.
    allowed = [SDPBackend.MATH] if chosen is None else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with backend.forced(chosen), sdpa_kernel(allowed):
        loss = loss_of(name, arguments)
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + sum(g.square().sum() for g in found)).backward()
    for each, expected in zip(inputs, stock_penalty(name), strict=True):
        assert_close(each.grad, expected)


@everywhere
@of_every_operator
def test_a_graph_that_nobody_uses_changes_no_gradient(name: str, chosen: str | None) -> None:
    arguments, inputs = case(name)
    with backend.forced(chosen):
        found = [torch.autograd.grad(loss_of(name, arguments), inputs, create_graph=g) for g in (False, True)]
    for plain, with_graph in zip(*found, strict=True):
        assert torch.equal(plain, with_graph)


def test_third_derivatives_are_stocks(triton_backend) -> None:
    x = torch.randn(3, 32, requires_grad=True)
    weight = torch.randn(32)
    found = []
    for layer_norm in (ops.layer_norm, lambda x, w, b, eps: F.layer_norm(x, (32,), w, b, eps)):
        y = layer_norm(x, weight, None, 1e-6).sin().sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(y, x, create_graph=True)
            y = grad.square().sum()
        found.append(grad)
    assert_close(*found)


def batched_by_autograd(loss: Tensor, inputs: list[Tensor], grads: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, grads, is_grads_batched=True, retain_graph=True)


def batched_by_vmap(loss: Tensor, inputs: list[Tensor], grads: Tensor) -> tuple[Tensor, ...]:
    return torch.vmap(lambda grad: torch.autograd.grad(loss, inputs, grad, retain_graph=True))(grads)


@everywhere
@of_every_operator
@pytest.mark.parametrize("gradients", [batched_by_autograd, batched_by_vmap])
def test_batched_gradients_are_those_one_by_one(name: str, chosen: str | None, gradients: Callable) -> None:
    arguments, inputs = case(name)
    with backend.forced(chosen):
        loss = loss_of(name, arguments)
        batched = gradients(loss, inputs, torch.tensor([1.0, -2.0]))
        single = torch.autograd.grad(loss, inputs)
    for ours, stock in zip(batched, single, strict=True):
        assert_close(ours[0], stock)
        assert_close(ours[1], -2 * stock)


@everywhere
@of_every_operator
def test_forward_mode_gives_the_directional_derivative(name: str, chosen: str | None) -> None:
    arguments, inputs = case(name)
    directions = [torch.randn_like(t) for t in inputs]
    with backend.forced(chosen), sdpa_kernel(SDPBackend.MATH):
        found = torch.autograd.grad(loss_of(name, arguments), inputs)
        expected = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
        with forward_ad.dual_level():
            duals = tuple(forward_ad.make_dual(t.detach(), d) for t, d in zip(inputs, directions, strict=True))
            tangent = forward_ad.unpack_dual(loss_at(name, arguments, inputs, duals)).tangent
    torch.testing.assert_close(tangent, expected.detach(), rtol=1e-3, atol=1e-3)


def uses_flash(run: Callable[[], Tensor]) -> bool:
    with torch.profiler.profile() as profile:
        run()
    return any("flash_attention_for_cpu" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("compiled", [False, True])
def test_sdpa_kernel_is_honoured_on_a_cpu(compiled: bool) -> None:
    qkv = torch.randn(2, 5, 3, 2, 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def stock() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.25).transpose(1, 2).flatten(2)

    def ours() -> Tensor:
        return ops.attention([qkv], 0.25)[0]

    expected = stock()
    for allowed in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        torch._dynamo.reset()
        runs = [torch.compile(run, backend="aot_eager", fullgraph=True) if compiled else run for run in (stock, ours)]
        with sdpa_kernel(allowed):
            for run in runs:
                torch.testing.assert_close(run(), expected)
            assert [uses_flash(run) for run in runs] == [allowed is SDPBackend.FLASH_ATTENTION] * 2


def test_sdpa_kernel_is_honoured_within_what_is_compiled() -> None:
    qkv = torch.randn(2, 5, 3, 2, 32)

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return ops.attention([qkv], 0.25)[0]

    torch.testing.assert_close(run(), ops.attention([qkv], 0.25)[0])
    assert not uses_flash(run)
