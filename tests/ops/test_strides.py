"""What an operator returns lies in memory as its shape function says: compiled code reads it by those strides."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deit_fast import ops
from deit_fast.ops import backend
from deit_fast.ops.examples import EPS, Inputs, Size
from tests.support.examples import examples

B, N, D, HEADS, HEAD_DIM = 3, 5, 64, 2, 32
SIZE = Size(B, N, D, HEADS, HEAD_DIM, hidden=96, grid=(2, 2), patch=4, classes=9)


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
    """The operators' examples, and some of kept samples, of nothing, and without what may be left out."""

    class Leaves(Inputs):
        def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return leaf(*shape)

    found = examples(SIZE, Leaves(SIZE, torch.float32, torch.device("cpu")), inference=False)
    del found["keep_samples"]
    # The functions find out themselves which gradients are needed.
    found |= {name: arguments[:-1] for name, arguments in found.items() if name.startswith("distillation_loss")}
    x, norm, w, v = leaf(B, N, D), leaf(D), leaf(D, D), leaf(D)
    kept = ops.keep_samples(torch.tensor([1.25, 0.0, 1.25]))
    factors, packed = torch.tensor([1.25, 0.0, 1.25]), leaf(2, N, D)
    mask = torch.arange(B * 4).view(B, 4) % 3 == 0
    return found | {
        "layer_norm_linear, kept": (x, norm, norm, EPS, [w], [v], kept, 2),
        "layer_norm_linear, shared": (x, norm, norm, EPS, [w] * 3, [v] * 3),
        "layer_norm_fc1, kept": (x, norm, norm, EPS, w, v, "gelu", kept, 2),
        "linear_residual, nothing scaled": (x, w, v, leaf(B, N, D)),
        "linear_residual, kept": (packed, w, v, leaf(B, N, D), v, factors, kept),
        "fc2_residual, kept": (packed, packed.detach(), w, v, leaf(B, N, D), v, factors, "gelu", kept),
        "mlp, kept": (x, norm, norm, EPS, leaf(96, D), leaf(96), leaf(D, 96), v, v, factors, "gelu", kept),
        "attention, kept": ([leaf(2, N, 3, HEADS, HEAD_DIM)], 0.2, kept),
        "patch_embed, positions of patches": (
            *(leaf(B, 3, 8, 8), leaf(D, 3, 4, 4), v, leaf(1, 4, D), None, None, leaf(1, 1, D), mask),
        ),
        "patch_embed, nothing": (leaf(0, 3, 8, 8), leaf(D, 3, 4, 4), v, leaf(1, 4, D)),
    }


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
        outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
        # Gradients that autograd has expanded, and that lie as the arguments do.
        outputs = [output for output in outputs if output.requires_grad]
        if outputs:
            sum(output.mean() for output in outputs).backward(retain_graph=True)
            torch.autograd.backward(outputs, [leaf(*output.shape).detach().to(output.dtype) for output in outputs])
    seen = compared.seen
    alone = name.startswith(("distillation_loss", "normalise_pixels"))
    assert len(seen) >= 2 - alone, "an operator and its backward"
    assert {operator: differing for operator, differing in seen.items() if differing} == {}
