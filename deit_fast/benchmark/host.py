"""The time that Python and the dispatcher take before a kernel starts, with the kernels left out.

On the swapped side the launch itself is stubbed by a stand-in for Triton's driver, compiled kernels and their arguments
included; on the stock side the batch is empty, so that PyTorch's kernels have nothing to do. Both run on CPU tensors in
one process, in turn. It is not a GPU's host time: the CUDA calls behind a launch and an allocation are not in it. The
read-out's products of queries and weights are PyTorch's: they do run, and are in its time.
"""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from deit_fast.benchmark.tables import figures
from deit_fast.benchmark.tables import table as markdown_table
from deit_fast.check.cases import OPS, CheckCase, Size, cases
from deit_fast.check.standin_driver import current_device
from deit_fast.check.targets import TARGETS
from deit_fast.ops import backend
from deit_fast.ops.operator import OPERATORS
from deit_fast.swap import swap

TARGET = "sm_90"
# Narrow: PyTorch fills the gradients of an empty batch's weights with zeros.
WIDTH, HEADS, IMAGE, PATCH, TOKENS, CLASSES = 64, 1, 224, 16, 198, 10
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
    """Of every operator, of timm's block and of its DeiT, for inference and then for forward and backward."""
    with _launches_stubbed():
        return [
            _measured(what, training, stock, ours, rounds, calls)
            for training in (False, True)
            for what, stock, ours in (*_operators(), *_modules(training))
        ]


def block_times(rounds: int, calls: int) -> list[HostTime]:
    """Of timm's block alone."""
    with _launches_stubbed():
        found = ((training, *next(_modules(training))) for training in (False, True))
        return [_measured(what, training, stock, ours, rounds, calls) for training, what, stock, ours in found]


@contextmanager
def _launches_stubbed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with current_device(TARGETS[TARGET]):
            yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Side:
    """What is called, and the tensors that its backward finds gradients of."""

    function: Callable[[], object]
    differentiable: list[Tensor]

    def infer(self) -> None:
        with torch.no_grad():
            self.function()

    def train(self) -> None:
        outputs = self.function()
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        found = [output for output in outputs if output.requires_grad]
        ones = [torch.ones_like(output) for output in found]
        # A key's bias cancels out of a read-out.
        torch.autograd.grad(found, self.differentiable, ones, allow_unused=True)


def _operators() -> Iterator[tuple[str, _Side, _Side]]:
    """By name, the stock operators that one stands for, and it, called as modules call it."""
    for op in OPS:
        empty, one = (_case(op, batch) for batch in (0, 1))
        # Of data alone: stock models have nothing in its place.
        if not one.differentiable:
            continue
        stock = partial(OPERATORS[op].stock, *_as_declared(op, empty))
        yield (
            op,
            _Side(stock, _differentiable(empty)),
            _Side(partial(one.function, **one.arguments), _differentiable(one)),
        )


def _case(op: str, batch: int) -> CheckCase:
    size = Size.of_model(WIDTH, HEADS, IMAGE, PATCH, CLASSES, batch)
    return next(cases(op, size, torch.bfloat16, torch.device("cpu")))


def _differentiable(case: CheckCase) -> list[Tensor]:
    return [case.tensors[name].requires_grad_() for name in case.differentiable]


def _as_declared(op: str, case: CheckCase) -> tuple:
    """All arguments of the operator; what its public function finds out itself is as if gradients were wanted."""
    return OPERATORS[op].Arguments(**{"needs": [True, True]} if op == "distillation_loss" else {}, **case.arguments)


def _modules(training: bool) -> Iterator[tuple[str, _Side, _Side]]:
    """By name, stock and swapped."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block

    def block() -> nn.Module:
        return nn.Sequential(Block(WIDTH, HEADS, qkv_bias=True))

    def model() -> nn.Module:
        return VisionTransformerDistilled(embed_dim=WIDTH, num_heads=HEADS, num_classes=CLASSES)

    for what, build, shape in (("block", block, (TOKENS, WIDTH)), ("model", model, (3, IMAGE, IMAGE))):
        stock, swapped = (build().to(torch.bfloat16).train(training) for _ in range(2))
        swap(swapped)
        yield what, _side(stock, 0, shape), _side(swapped, 1, shape)


def _side(module: nn.Module, batch: int, shape: tuple[int, ...]) -> _Side:
    called = module[0] if isinstance(module, nn.Sequential) else module
    return _Side(partial(called, torch.zeros(batch, *shape, dtype=torch.bfloat16)), list(module.parameters()))


def _measured(what: str, training: bool, stock: _Side, ours: _Side, rounds: int, calls: int) -> HostTime:
    """Both take turns, and each goes first in every other round."""
    found: dict[str, list[float]] = {"stock": [], "ours": []}
    for i in range(rounds + 1):
        for name in ("stock", "ours") if i % 2 else ("ours", "stock"):
            side, kernels = (ours, _kernels()) if name == "ours" else (stock, nullcontext())
            with kernels:
                found[name].append(_seconds(side.train if training else side.infer, calls))
    step = "forward and backward" if training else "inference"
    # The first round compiles.
    return HostTime(what, step, *(1e6 * median(seconds[1:]) for seconds in found.values()))


@contextmanager
def _kernels() -> Iterator[None]:
    """The kernels run, or it is an error."""
    with backend.forced("triton"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="deit_fast.*stock PyTorch operators")
        yield


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
