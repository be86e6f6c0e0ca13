"""The time that Python and the dispatcher take before a kernel starts, with the kernels left out.

On the swapped side the launch itself is stubbed by a stand-in for Triton's driver, compiled kernels and their arguments
included; on the stock side the batch is empty, so that PyTorch's kernels have nothing to do. Both run on CPU tensors in
one process, in turn. It is not a GPU's host time: the CUDA calls behind a launch and an allocation are not in it.
"""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from deit_fast.benchmark.standin_driver import current_device
from deit_fast.benchmark.tables import figures
from deit_fast.benchmark.tables import table as markdown_table
from deit_fast.benchmark.targets import TARGETS
from deit_fast.ops import backend
from deit_fast.swap import restore, swap

TARGET = "sm_90"
# Narrow: PyTorch fills the gradients of an empty batch's weights with zeros.
WIDTH, HEADS, TOKENS = 64, 1, 198
ROUNDS, CALLS = 21, 50


@dataclass(frozen=True)
class HostTime:
    """Medians of rounds, µs a call."""

    what: str
    step: str
    stock: float
    swapped: float

    @property
    def ratio(self) -> float:
        return self.swapped / self.stock


def host_times(rounds: int = ROUNDS, calls: int = CALLS) -> list[HostTime]:
    """Of timm's block and of its DeiT, stock and swapped, for inference and for forward and backward."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with current_device(TARGETS[TARGET]):
            return [
                _measured(what, step, module, shape, rounds, calls)
                for what, module, shape in (("block", _block(), (TOKENS, WIDTH)), ("model", _model(), (3, 224, 224)))
                for step in ("inference", "forward and backward")
            ]
    finally:
        torch.set_num_threads(threads)


def _block() -> nn.Module:
    from timm.models.vision_transformer import Block

    return nn.Sequential(Block(WIDTH, HEADS, qkv_bias=True)).to(torch.bfloat16)


def _model() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(embed_dim=WIDTH, num_heads=HEADS, num_classes=10).to(torch.bfloat16)


def _measured(what: str, step: str, module: nn.Module, shape: tuple[int, ...], rounds: int, calls: int) -> HostTime:
    """Swapped and stock take turns, and each goes first in every other round."""
    backward = step != "inference"
    module.train(backward)
    called = module[0] if isinstance(module, nn.Sequential) else module
    stock_call = _call(called, torch.zeros(0, *shape, dtype=torch.bfloat16), backward)
    swapped_call = _call(called, torch.zeros(1, *shape, dtype=torch.bfloat16), backward)

    def stock() -> float:
        return _seconds(stock_call, calls)

    def swapped() -> float:
        swap(module)
        try:
            with backend.forced("triton"), warnings.catch_warnings():
                warnings.filterwarnings("error", message="deit_fast.*stock PyTorch operators")
                return _seconds(swapped_call, calls)
        finally:
            restore(module)

    found: dict[Callable, list[float]] = {stock: [], swapped: []}
    for i in range(rounds + 1):
        for side in (stock, swapped) if i % 2 else (swapped, stock):
            found[side].append(side())
    # The first round compiles.
    return HostTime(what, step, *(1e6 * median(found[side][1:]) for side in (stock, swapped)))


def _call(module: nn.Module, x: Tensor, backward: bool) -> Callable[[], None]:
    if not backward:

        def infer() -> None:
            with torch.no_grad():
                module(x)

        return infer

    parameters = list(module.parameters())

    def train() -> None:
        y = module(x)
        y = sum(each.sum() for each in y) if isinstance(y, tuple) else y
        torch.autograd.grad(y, parameters, torch.ones_like(y))

    return train


def _seconds(call: Callable[[], None], calls: int) -> float:
    """Of one call, after a first that is not counted; the garbage collector waits."""
    call()
    gc.disable()
    try:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls
    finally:
        gc.enable()


def table(times: list[HostTime]) -> str:
    rows = ((t.what, t.step, f"{t.stock:.0f}", f"{t.swapped:.0f}", f"{t.ratio:.2f}") for t in times)
    return markdown_table(
        ("Python and dispatcher, µs", "step", *figures(("stock", "swapped", "swapped / stock"))), rows
    )
