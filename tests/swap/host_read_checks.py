"""Trains swapped models with drop path through the stand-in driver, where no tensor's value can be read.

Prints what was launched and what torch ran, as JSON for `test_no_host_reads`. A program of its own because the test
process has TRITON_INTERPRET set.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from triton.runtime import jit

from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.ops import backend
from deit_fast.swap import swap

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 10}
READS = ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__")


def unreadable(*_) -> None:
    raise AssertionError("a tensor's value was read on the host")


@contextmanager
def on_a_gpu(kernels: set[str]) -> Iterator[None]:
    """Launchers up to the launch itself, which only notes the kernel's name: what it would compile matters not here."""
    with ExitStack() as stack:
        stack.enter_context(recording(TARGETS["sm_90"]))
        stack.enter_context(backend.forced("triton"))
        stack.enter_context(
            mock.patch.object(jit.JITFunction, "run", lambda self, *_, **__: kernels.add(self.__name__))
        )
        for name in READS:
            stack.enter_context(mock.patch.object(Tensor, name, unreadable))
        yield


def build(**options) -> nn.Module:
    model = VisionTransformerDistilled(drop_path_rate=0.5, init_values=0.1, **SIZES).train()
    swap(model, **options)
    return model


def train(model: nn.Module, images: Tensor, kernels: set[str], dtype: torch.dtype) -> bool:
    """Whether one step read nothing: forward, backward, and a gradient for every parameter."""
    with on_a_gpu(kernels):
        try:
            with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
                out = model(images)
            out.sum().backward()
        except AssertionError:
            return False
    return all(p.grad is not None for p in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    # A read in a launcher must not end in the stock operators.
    warnings.filterwarnings("error", message="deit_fast")
    images, kernels = torch.randn(4, 3, 32, 32), set()
    # Before the profile: timm's constructor reads its drop path rates.
    balanced, low, whole = build(), build(memory="low"), build(readout=False)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        steps = {
            "balanced": train(balanced, images, kernels, torch.bfloat16),
            "low": train(low, images, kernels, torch.float32),
            "whole": train(whole, images, kernels, torch.float32),
        }
    operators = {event.key for event in seen.key_averages()}
    compact = train(build(compact_drop_path=True), images, set(), torch.float32)
    print(json.dumps({"steps": steps, "compact": compact, "kernels": sorted(kernels), "operators": sorted(operators)}))


if __name__ == "__main__":
    main()
