"""Training with drop path on a GPU never waits for the device, shown without one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.ops.operator import OPERATORS
from deit_fast.swap import swap
from tests.support.compiled import printed_by
from tests.swap.test_drop_path import MODELS, build

READS = {"item", "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "unique", "_unique2"}


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._opname not in READS, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def on_a_fake_gpu(model: nn.Module) -> Iterator[Tensor]:
    """The model's parameters and a batch of images without values on "cuda"."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
        yield torch.empty(4, 3, 32, 32, device="cuda")


@pytest.mark.parametrize("options", [{}, {"memory": "low"}, {"readout": False}])
@pytest.mark.parametrize("name", MODELS)
def test_forward_reads_nothing(name, options) -> None:
    model = build(name)
    swap(model, **options)
    with on_a_fake_gpu(model) as images, NoReads():
        out = model(images)
    assert out.device.type == "cuda" and out.requires_grad


def test_compact_drop_path_reads_before_the_first_block() -> None:
    """And fake tensors notice."""
    model = build()
    swap(model, compact_drop_path=True)
    with on_a_fake_gpu(model) as images, pytest.raises(DataDependentOutputException):
        model(images)


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.swap.host_read_checks")


def test_no_launcher_reads_a_value_in_forward_or_backward(seen) -> None:
    assert seen["steps"] == {"balanced": True, "low": True, "whole": True}
    forward = {"keep_samples_kernel", "linear_kernel", "attention_kernel", "readout_kernel"}
    backward = {"weight_gradient_kernel", "input_gradient_kernel", "key_gradient_kernel", "readout_backward_kernel"}
    assert forward | backward <= set(seen["kernels"])


def test_no_operator_of_torchs_waits_for_the_device(seen) -> None:
    assert "deit_fast::keep_samples" in seen["operators"]
    assert not {f"aten::{name}" for name in READS} & set(seen["operators"])


def test_the_launchers_would_be_caught_reading(seen) -> None:
    assert seen["compact"] is False


def test_stock_operators_in_the_kernels_place_read_nothing() -> None:
    """Where the kernels can't take a step's tensors, or `deit-fast tune` found stock to be faster."""
    with FakeTensorMode(), NoReads():
        x, weight, vector, factors = (
            torch.empty(shape, device="cuda") for shape in ((4, 5, 64), (192, 64), (64,), (4,))
        )
        kept, back = torch.empty(5, dtype=torch.int32, device="cuda"), weight[:64]
        norm = vector, vector, 1e-6
        (qkv,) = stock("layer_norm_linear")(x, *norm, [weight], [None], kept, 4, "none")
        by_head = qkv.view(4, 5, 3, 1, 64)
        out, log_sum_exp = stock("attention")([by_head], 0.125, kept)
        y = stock("linear_residual")(out, back, vector, x, vector, factors, kept)
        hidden = stock("layer_norm_fc1")(y, *norm, weight, None, "gelu", kept, 4)
        stock("fc2_residual")(*hidden, weight.T, None, y, vector, factors, "gelu", kept)
        stock("mlp")(y, *norm, weight, None, weight.T, None, vector, factors, "gelu", kept)
        found = stock("linear_backward")(y, out, back, vector, vector, factors, "none", kept, [True] * 4)
        (of_qkv,) = stock("attention_backward")(found[0], [by_head], out, log_sum_exp, 0.125, kept)
        needs = [True] * 4 + [False]
        stock("layer_norm_linear_backward")(x, *norm, [of_qkv.flatten(2)], [weight], [None], kept, y, needs)


def stock(name: str):
    return OPERATORS[name].stock
