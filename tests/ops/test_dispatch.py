"""The operators as PyTorch's ecosystem sees them."""

import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast import ops
from deit_fast.ops import backend

EPS = 1e-6


def samples(requires_grad: bool = False) -> dict[str, tuple]:
    torch.manual_seed(0)
    d, heads = 32, 1

    def tensor(*shape):
        return torch.randn(*shape).requires_grad_(requires_grad)

    x, w, v = tensor(2, 5, d), tensor(d, d), tensor(d)
    return {
        "layer_norm": (x, v, v, EPS),
        "add_layer_norm": (x, tensor(2, 5, d), v, None, EPS),
        "linear": (x, w, v, "none" if requires_grad else "gelu", "none"),
        "layer_norm_linear": (x, v, v, EPS, w, v, None, None),
        "layer_norm_qkv": (x, v, v, EPS, w, v, tensor(d, d), None, tensor(d, d), v),
        "linear_residual": (x, w, v, tensor(2, 5, d), v, torch.randn(2), "gelu", None),
        "mlp": (x, v, v, EPS, tensor(64, d), tensor(64), tensor(d, 64), v, v, None, "gelu", None),
        "attention": (tensor(2, 5, 3, heads, 32), 0.2, None),
        "attention_qkv": (tensor(2, 5, heads, 32), tensor(2, 5, heads, 32), tensor(2, 5, heads, 32), 0.2),
        "readout_attention": (x, v, v, EPS, tensor(3 * d, d), tensor(3 * d), 2, heads, 0.2),
        "readout_attention_qkv": (x, v, v, EPS, w, v, tensor(d, d), v, tensor(d, d), v, 1, heads, 0.2),
        "patch_embed": (tensor(2, 3, 8, 8), tensor(d, 3, 4, 4), v, tensor(1, 5, d), tensor(1, 1, d), *[None] * 5),
    }


def packet(name: str):
    return getattr(torch.ops.deit_fast, name).default


@pytest.mark.parametrize("name", samples())
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(name, requires_grad):
    with backend.forced("torch"):
        torch.library.opcheck(packet(name), samples(requires_grad)[name])


@pytest.mark.parametrize("name", samples())
def test_second_derivatives_are_refused(name):
    """Also with the Triton backend forced, where a wrong answer would otherwise hide."""
    arguments = samples(requires_grad=True)[name]
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    with backend.forced("triton"):
        result = getattr(ops, name)(*arguments)
        loss = (result if isinstance(result, torch.Tensor) else result[-1 if name == "add_layer_norm" else 0]).sum()
        with pytest.raises(NotImplementedError, match="second derivatives need the stock model"):
            torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("name", samples())
def test_functional_transforms_go_through(name):
    arguments = samples()[name]

    def loss(x):
        result = getattr(ops, name)(x, *arguments[1:])
        return (result if isinstance(result, torch.Tensor) else result[0]).square().sum()

    assert torch.isfinite(torch.func.grad(loss)(arguments[0])).all()


@pytest.mark.parametrize("name", samples())
def test_compiles_without_a_graph_break(name):
    arguments = samples()[name]
    function = getattr(ops, name)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ours, stock in zip(compiled(*arguments), function(*arguments), strict=True):
            torch.testing.assert_close(ours, stock)


@pytest.mark.parametrize("name", samples())
def test_inference_dispatches_one_operator(name):
    """What the boundary counts of `bench/traffic.py` rest on."""
    calls = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    arguments = samples()[name]
    with torch.no_grad(), Log():
        getattr(ops, name)(*arguments)
    assert calls == [packet(name)]


@pytest.mark.parametrize("name", samples())
def test_float64_runs_on_the_stock_operators_and_says_so_once(name):
    arguments = [a.double() if isinstance(a, torch.Tensor) else a for a in samples()[name]]
    backend.said.clear()
    with backend.forced("triton"), torch.no_grad():
        with pytest.warns(UserWarning, match=f"deit_fast.{name}: no kernel for torch.float64; using the stock"):
            getattr(ops, name)(*arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(ops, name)(*arguments)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'triton', 'torch' or None; got 'cuda'"), backend.forced("cuda"):
        pass


def test_the_operator_itself_refuses_a_gradient_through_its_epilogues_activation():
    """`ops.linear` puts the activation behind it instead."""
    arguments = samples(requires_grad=True)["linear"][:3]
    with backend.forced("torch"):
        with pytest.raises(NotImplementedError, match=r"call ops\.linear"):
            packet("linear")(*arguments, "gelu", "none")
        assert ops.linear(*arguments, "gelu", "none").requires_grad
