"""The operators as PyTorch's ecosystem sees them."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from deit_fast import ops
from deit_fast.ops import backend
from deit_fast.ops.examples import Inputs, Size
from tests.support.examples import examples, packet, public, tensors

SIZE = Size(batch=2, tokens=5, width=32, heads=1, head_dim=32, hidden=64, grid=(2, 2), patch=4, classes=7)
# Without a gradient, or with their own: what is asked of the others does not hold of them.
APART = ("keep_samples", "distillation_loss")


def samples(requires_grad: bool = False) -> dict[str, tuple]:
    """The operators' examples, and of some one without what it may do without."""

    class Leaves(Inputs):
        def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
            return super().normal(*shape, scale=scale, mean=mean).requires_grad_(requires_grad)

    new = Leaves(SIZE, torch.float32, torch.device("cpu"))
    found = examples(SIZE, new, inference=not requires_grad)
    x, norm_weight, _, eps, weights, biases, *rest = found["layer_norm_linear, separate q, k, v"]
    found["layer_norm_linear, no bias of k"] = (x, norm_weight, None, eps, weights, [biases[0], None, biases[2]], *rest)
    x, residual, weight, _, eps = found["add_layer_norm"]
    found["add_layer_norm, no bias"] = (x, residual, weight, None, eps)
    return {name: a for name, a in found.items() if not name.startswith(APART) and tensors(a)[0].is_floating_point()}


@pytest.mark.parametrize(
    ("name", "requires_grad"), [(name, wanted) for wanted in (False, True) for name in samples(wanted)]
)
def test_opcheck(name, requires_grad):
    with backend.forced("torch"):
        torch.library.opcheck(packet(name), samples(requires_grad)[name])


@pytest.mark.parametrize("name", samples())
def test_functional_transforms_go_through(name):
    arguments = samples()[name]

    def loss(x):
        first = [x, *arguments[0][1:]] if isinstance(arguments[0], list) else x
        result = public(name)(first, *arguments[1:])
        return (result if isinstance(result, torch.Tensor) else result[0]).square().sum()

    assert torch.isfinite(torch.func.grad(loss)(tensors(arguments)[0])).all()


@pytest.mark.parametrize("name", samples())
def test_compiles_without_a_graph_break(name):
    arguments = samples()[name]
    function = public(name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, stock in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("name", samples())
def test_inference_dispatches_one_operator(name):
    """What the boundary counts of `evidence/traffic.py` rest on."""
    calls = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    arguments = samples()[name]
    with torch.no_grad(), Log():
        public(name)(*arguments)
    assert calls == [packet(name)]


@pytest.mark.parametrize("name", samples())
def test_float64_runs_on_the_stock_operators_and_says_so_once(name):
    arguments = tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, samples()[name])
    backend.said.clear()
    with backend.forced("triton"), torch.no_grad():
        with pytest.warns(
            UserWarning, match=f"deit_fast.{name.partition(',')[0]}: no kernel for torch.float64; using the stock"
        ):
            public(name)(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            public(name)(*arguments)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'triton', 'torch' or None; got 'cuda'"), backend.forced("cuda"):
        pass


def test_the_operator_itself_refuses_a_gradient_through_its_epilogues_activation():
    """`ops.linear` puts the activation behind it instead."""
    arguments = samples(requires_grad=True)["linear"][:3]
    with backend.forced("torch"):
        with pytest.raises(NotImplementedError, match=r"call ops\.linear"):
            packet("linear")(*arguments, "gelu")
        assert ops.linear(*arguments, "gelu").requires_grad
