"""What an operator returns lies in memory as its shape function says: compiled code reads it by those strides."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deit_fast import ops
from deit_fast.ops import backend
from deit_fast.ops.registration import OPERATORS

EPS = 1e-6
B, N, D, HEADS, HEAD_DIM = 3, 5, 64, 2, 32


class _Compared(TorchDispatchMode):
    """Calls of our operators, each with the outputs that its shape function describes otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "deit_fast":
            with FakeTensorMode() as mode:
                described = func(*tree_map_only(Tensor, mode.from_tensor, args))
            differing = self.seen.setdefault(func._schema.name.partition("::")[2], [])
            for real, fake in zip(tree_leaves(result), tree_leaves(described), strict=True):
                if (real is None) is not (fake is None) or (real is not None and _layout(real) != _layout(fake)):
                    differing.append(f"{_layout(real)}, described as {_layout(fake)}")
        return result


def _layout(tensor: Tensor) -> tuple:
    """Shape, dtype and the strides that lead to another element."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True) if tensor.numel() else ()
    return tuple(tensor.shape), [stride for size, stride in sizes if size > 1], tensor.dtype


def _samples(leaf) -> dict[str, tuple]:
    x, norm, w, qkv, v = leaf(B, N, D), leaf(D), leaf(D, D), leaf(3 * D, D), leaf(D)
    kept = ops.keep_samples(torch.tensor([1.25, 0.0, 1.25]))
    factors, packed = torch.tensor([1.25, 0.0, 1.25]), leaf(2, N, D)
    mask = torch.arange(B * 4).view(B, 4) % 3 == 0
    heads = [leaf(B, N, HEADS, HEAD_DIM) for _ in range(3)]
    return {
        "layer_norm": (x, norm, norm, EPS),
        "add_layer_norm": (x, leaf(B, N, D), norm, norm, EPS),
        "linear": (x, w, v, "none", "gelu"),
        "layer_norm_linear": (x, norm, norm, EPS, w, v),
        "layer_norm_linear, kept": (x, norm, norm, EPS, w, v, kept, 2),
        "layer_norm_qkv": (x, norm, norm, EPS, w, v, w, v, w, v),
        "linear_residual": (x, w, v, leaf(B, N, D), v, factors, "gelu"),
        "linear_residual, nothing scaled": (x, w, v, leaf(B, N, D)),
        "linear_residual, kept": (packed, w, v, leaf(B, N, D), v, factors, "gelu", kept),
        "mlp": (x, norm, norm, EPS, leaf(96, D), leaf(96), leaf(D, 96), v, v, factors, "gelu"),
        "mlp, kept": (x, norm, norm, EPS, leaf(96, D), leaf(96), leaf(D, 96), v, v, factors, "gelu", kept),
        "attention": (leaf(B, N, 3, HEADS, HEAD_DIM), 0.2),
        "attention, kept": (leaf(2, N, 3, HEADS, HEAD_DIM), 0.2, kept),
        "attention_qkv": (*heads, 0.2),
        "readout_attention": (x, norm, norm, EPS, qkv, leaf(3 * D), 2, HEADS, 0.2),
        "readout_attention_qkv": (x, norm, norm, EPS, w, v, w, v, w, v, 2, HEADS, 0.2),
        "distillation_loss": (leaf(B, 9), leaf(B, 9), torch.arange(B), torch.randn(B, 9), "soft", 0.5, 3.0),
        "patch_embed": (leaf(B, 3, 8, 8), leaf(D, 3, 4, 4), v, leaf(1, 6, D), leaf(1, 1, D), leaf(1, 1, D)),
        "patch_embed, masked": (leaf(B, 3, 8, 8), leaf(D, 3, 4, 4), v, leaf(1, 4, D), None, None, leaf(1, 1, D), mask),
        "patch_embed, nothing": (leaf(0, 3, 8, 8), leaf(D, 3, 4, 4), v, leaf(1, 4, D)),
    }


def test_every_operator_is_here():
    forward = {name for name in OPERATORS if not name.endswith("_backward")}
    assert forward <= {name.partition(",")[0] for name in _samples(_contiguous)} | {"keep_samples"}


def _contiguous(*shape: int) -> Tensor:
    return torch.randn(shape).requires_grad_()


def _turned(*shape: int) -> Tensor:
    """The first two dimensions the other way round in memory."""
    if len(shape) < 2:
        return _contiguous(*shape)
    return torch.randn(shape[1], shape[0], *shape[2:]).transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("chosen", ["torch", "triton"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("leaf", [_contiguous, _turned])
@pytest.mark.parametrize("name", _samples(_contiguous))
def test_outputs_and_gradients_lie_as_described(name, leaf, autocast, chosen):
    torch.manual_seed(0)
    arguments = _samples(leaf)[name]
    function = getattr(ops, name.partition(",")[0])
    with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16, autocast), _Compared() as compared:
        outputs = function(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # Gradients that autograd has expanded, and that lie as the arguments do.
        outputs = [output for output in outputs if output.requires_grad]
        sum(output.mean() for output in outputs).backward(retain_graph=True)
        torch.autograd.backward(outputs, [leaf(*output.shape).detach().to(output.dtype) for output in outputs])
    seen = compared.seen
    assert len(seen) >= 2 or name == "distillation_loss", "an operator and its backward"
    assert {operator: differing for operator, differing in seen.items() if differing} == {}
