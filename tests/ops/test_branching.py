"""A residual that goes past a branch's first operator: its gradient is added where LayerNorm's backward writes."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast import ops
from deit_fast.ops import backend
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn

EPS = 1e-6
NAMES = ("x", "norm_weight", "norm_bias", "weight", "bias", "back")
KEPT = torch.tensor([0.0, 1.25, 0.0, 1.25])
everywhere = pytest.mark.parametrize("chosen", ["triton", "torch"])


def branch(branching: bool, scale: Tensor | None, x, norm_weight, norm_bias, weight, bias, back) -> Tensor:
    kept = None if scale is None else ops.keep_samples(scale)
    arguments = x, norm_weight, norm_bias, EPS, [weight], [bias], kept
    (hidden,), residual = (
        ops.layer_norm_linear_branching(*arguments) if branching else (ops.layer_norm_linear(*arguments), x)
    )
    return ops.linear_residual(hidden, back, None, residual, None, scale, kept)


def branch_mlp(branching: bool, scale: Tensor | None, x, norm_weight, norm_bias, weight, bias, back) -> Tensor:
    kept = None if scale is None else ops.keep_samples(scale)
    arguments = x, norm_weight, norm_bias, EPS, weight, bias, "gelu", kept
    hidden, residual = ops.layer_norm_fc1_branching(*arguments) if branching else (ops.layer_norm_fc1(*arguments), x)
    return ops.fc2_residual(*hidden, back, None, residual, None, scale, "gelu", kept)


def branch_qkv(branching: bool, _, x, norm_weight, norm_bias, weight, bias, back) -> Tensor:
    arguments = x, norm_weight, norm_bias, EPS, [weight, weight.flip(0), -weight], [bias, None, bias]
    qkv, residual = ops.layer_norm_linear_branching(*arguments) if branching else (ops.layer_norm_linear(*arguments), x)
    return ops.linear_residual(sum(qkv), back, None, residual)


def leaves(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = (4, 9, 64), (64,), (64,), (96, 64), (96,), (64, 96)
    return [randn(*shape, dtype=dtype, scale=0.2).requires_grad_() for shape in shapes]


class _Additions(TorchDispatchMode):
    """How often tensors of `shape` are added, outside our operators."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._schema.name == "aten::add" and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def gradients(function, branching: bool, scale: Tensor | None, inputs: list[Tensor]) -> tuple[list[Tensor], int]:
    """Of all inputs, and how often backward adds tensors of the first one's shape."""
    torch.manual_seed(1)
    y = function(branching, scale, *inputs)
    grad = randn(*y.shape, dtype=torch.float64).to(y.dtype)
    with _Additions(inputs[0].shape) as additions:
        found = torch.autograd.grad(y, inputs, grad)
    return list(found), additions.count


def in_both_ways(function, scale: Tensor | None, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    fused, none = gradients(function, True, scale, inputs)
    apart, one = gradients(function, False, scale, inputs)
    assert (none, one) == (0, 1)
    return fused, apart


@everywhere
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, KEPT], ids=["whole", "kept"])
@pytest.mark.parametrize("function", [branch, branch_qkv, branch_mlp])
def test_gradients_are_those_of_the_parts(function, scale, dtype, chosen):
    inputs = leaves(dtype)
    with backend.forced(chosen):
        fused, apart = in_both_ways(function, scale, inputs)
    exact, _ = gradients(function, False, scale, [t.detach().double().requires_grad_() for t in inputs])
    for name, ours, parts, wanted in zip(NAMES, fused, apart, exact, strict=True):
        assert_as_accurate_as_stock(ours, parts, wanted, dtype, name)


@everywhere
@pytest.mark.parametrize("function", [branch, branch_qkv, branch_mlp])
def test_autocast_casts_as_it_does_without_a_branch(function, chosen):
    inputs = leaves(torch.float32)
    with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16):
        fused, apart = in_both_ways(function, None, inputs)
        y = function(True, None, *inputs)
        assert torch.equal(y, function(False, None, *inputs)) and y.dtype is torch.float32
    for ours, parts in zip(fused, apart, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours, parts, rtol=1e-6, atol=1e-6)


@everywhere
def test_frozen_inputs_get_no_gradient(chosen):
    inputs = [t.detach() for t in leaves(torch.float32)]
    with backend.forced(chosen):
        x, weight = inputs[0].requires_grad_(), inputs[3]
        y = branch(True, None, *inputs)
        (of_x,) = torch.autograd.grad(y.sum(), [x])
        expected = torch.autograd.grad(branch(False, None, *inputs).sum(), [x])[0]
        torch.testing.assert_close(of_x, expected)
        x.requires_grad_(False)
        assert not branch(True, None, *inputs).requires_grad
        weight.requires_grad_()
        assert torch.autograd.grad(branch(True, None, *inputs).sum(), [weight])[0].count_nonzero()


def test_on_a_cpu_it_is_the_stock_form_and_x_itself():
    inputs = leaves(torch.float32)
    _, residual = ops.layer_norm_linear_branching(inputs[0], None, None, EPS, [inputs[3]], [None])
    assert residual is inputs[0]


def test_compiled_it_is_the_operator_and_x():
    inputs = leaves(torch.float32)
    with backend.forced("torch"):
        step = torch.compile(lambda *args: branch(True, None, *args), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(*inputs), branch(True, None, *inputs))
        step(*inputs).sum().backward()
    assert all(t.grad is not None for t in inputs)


def test_under_a_functional_transform_it_is_the_stock_form():
    inputs = leaves(torch.float32)
    with backend.forced("torch"):
        of_x = torch.func.grad(lambda x: branch(True, None, x, *inputs[1:]).sum())(inputs[0].detach())
        expected = torch.autograd.grad(branch(True, None, *inputs).sum(), inputs[:1])[0]
    torch.testing.assert_close(of_x, expected)
