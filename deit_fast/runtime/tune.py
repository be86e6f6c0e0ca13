"""What a model runs on, measured on its own GPU: never slower than stock afterwards."""

import hashlib
import logging
import time
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from deit_fast.benchmark.clock import Clock, GpuClock
from deit_fast.benchmark.operator_cases import calls_of
from deit_fast.benchmark.tune import tune as tune_operators
from deit_fast.kernels.launching import hardware, replay, tuned
from deit_fast.kernels.launching.tuned import Choice
from deit_fast.runtime.apart import apart
from deit_fast.runtime.step import step
from deit_fast.swap.core import as_stock, restore, swapped_parts
from deit_fast.swap.report import SwapReport

ROUNDS = 7
# Of the time given: the rest is for blocks, which decide whether anything is gained.
_FOR_OPERATORS = 0.8
_log = logging.getLogger("deit_fast")


def tune(model: nn.Module, images: Tensor, *, training: bool = False, minutes: float = 10.0) -> SwapReport:
    """Measures the swapped `model` on its GPU, in place, and leaves to stock PyTorch what runs faster there.

    First the operators of a step are measured with other launch settings, and with the stock operators in their place.
    Then every kind of block, embedding and norm is measured against its stock module, in the same step, and after them
    the whole model. Where stock is faster the modules are stock again, and the report says by how much. What was
    measured is kept for this GPU in the folder of `deit-fast tune`: the next call reads it.

    images: [batch, channels, height, width], as the model will get them, on its GPU. training: with backward, in
    training mode, else inference in evaluation mode. Call it in an autocast block if the steps will run in one. The
    model's modes, gradients and buffers, and the random numbers drawn after it, are as before. minutes: no new
    measurement begins later; a part that was not measured stays swapped.

    A kernel that fails on the GPU can end its CUDA context: tune before training, not in the middle of it.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in `model` is swapped, images are not on a GPU, or minutes are not positive.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"deit_fast.tune takes a torch.nn.Module, got {type(model).__name__}")
    if not swapped_parts(model):
        raise ValueError("deit_fast.tune found nothing swapped in this model; call deit_fast.swap on it first")
    if not images.is_cuda:
        raise ValueError(
            f"deit_fast.tune measures a GPU, and the images are on {images.device}: move model and images to the GPU"
        )
    if not minutes > 0:
        raise ValueError(f"deit_fast.tune: minutes must be positive, got {minutes}")
    return tune_by(GpuClock(images.device), model, images, training, time.monotonic(), 60 * minutes)


def tune_by(clock: Clock, model: nn.Module, images: Tensor, training: bool, began: float, seconds: float) -> SwapReport:
    """`tune` by any clock. began: by `time.monotonic`."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    gpus = [images.device] if images.is_cuda else []
    try:
        model.train(training)
        with torch.random.fork_rng(gpus), apart():
            whole = _Measured("", model, (images,), {}, training)
            _tune_operators(whole, clock, began + _FOR_OPERATORS * seconds)
            kept = _slower_parts(model, whole, clock, began + seconds)
            for name in kept:
                restore(model.get_submodule(name))
            if swapped_parts(model):
                reason = _slower(whole, clock, began + seconds)
                if reason is not None:
                    kept |= dict.fromkeys(swapped_parts(model), f"in the whole model {reason}")
                    restore(model)
    finally:
        for module, mode in modes:
            module.training = mode
        for buffer, before in buffers:
            buffer.copy_(before)
    return _report(model, kept)


class _Measured(NamedTuple):
    """A module of the model, called as the model calls it."""

    name: str
    module: nn.Module
    args: tuple
    kwargs: dict
    training: bool

    def run(self) -> None:
        inputs = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        tensors = [*inputs, *self.module.parameters()] if self.training else []
        step(lambda: self.module(*self.args, **self.kwargs), [tensor for tensor in tensors if tensor.requires_grad])

    @property
    def described(self) -> str:
        """What its time depends on but for the batch, in a line, as tuned files have it."""
        inputs = [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]
        parameters = [
            (name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in self.module.named_parameters()
        ]
        options = [module.__dict__.get("_deit_fast_memory") for module in self.module.modules()]
        device_type = inputs[0].device.type
        autocast = torch.is_autocast_enabled(device_type) and str(torch.get_autocast_dtype(device_type))
        dtypes, parts = [str(each.dtype) for each in inputs], list(swapped_parts(self.module))
        everything = repr((repr(self.module), parts, parameters, options, autocast, dtypes))
        told = hashlib.sha256(everything.encode()).hexdigest()[:16]
        sides = "+".join("x".join(map(str, each.shape[1:])) for each in inputs)
        return f"{sides},{'training' if self.training else 'inference'},{told}"

    @property
    def batch(self) -> int:
        return next(leaf.shape[0] for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor))


def _tune_operators(whole: _Measured, clock: Clock, ends: float) -> None:
    device_name, driver = hardware.device_name(whole.args[0].device), hardware.driver_version()
    for case in calls_of(whole.run):
        known = case.batch in tuned.measured(case.operator.name, case.shape, device_name, driver)
        if known or time.monotonic() > ends:
            continue
        for result in tune_operators([case], clock, ROUNDS, _log.info, ends):
            if result.failure is None:
                tuned.write(case.operator.name, case.shape, device_name, driver, case.batch, result.choice)
    replay.forget()


def _slower_parts(model: nn.Module, whole: _Measured, clock: Clock, ends: float) -> dict[str, str]:
    """By name, the parts that stock computes faster, and why that is known."""
    found: dict[tuple, str | None] = {}
    slower = {}
    for part in _called(model, whole):
        kind = type(part.module), part.described, part.batch
        if kind not in found:
            found[kind] = _slower(part, clock, ends)
        reason = found[kind]
        if reason is not None:
            slower[part.name] = reason
    return slower


def _called(model: nn.Module, whole: _Measured) -> list[_Measured]:
    """Each swapped part with what a step of the stock model calls it with: a hook would keep a swapped part stock."""
    names = {module: name for name, module in swapped_parts(model).items()}
    called: dict[nn.Module, _Measured] = {}

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        def alone(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_(whole.training and tensor.is_floating_point())

        args, kwargs = tree_map_only(Tensor, alone, (args, kwargs))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            called.setdefault(module, _Measured(names[module], module, args, kwargs, whole.training))

    with as_stock(model):
        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in names]
        try:
            whole.run()
        finally:
            for hook in hooks:
                hook.remove()
    return list(called.values())


def _slower(part: _Measured, clock: Clock, ends: float) -> str | None:
    """That stock computes `part` faster, in words, measured now or before; None where it does not, or time is up."""
    device_name, driver = hardware.device_name(part.args[0].device), hardware.driver_version()
    kind = f"module {type(part.module).__name__}"
    before = tuned.measured(kind, part.described, device_name, driver).get(part.batch)
    if before is not None:
        return f"stock was faster on {device_name} at batch {part.batch}" if before.stock else None
    if time.monotonic() > ends:
        return None
    _log.info("%s against stock", part.name or "the model")
    stock, swapped = _medians(part, clock)
    tuned.write(kind, part.described, device_name, driver, part.batch, Choice(stock < swapped, {}))
    if swapped <= stock:
        return None
    return f"stock is faster on {device_name} at batch {part.batch}: {1e6 * stock:.0f} µs against {1e6 * swapped:.0f}"


def _medians(part: _Measured, clock: Clock) -> tuple[float, float]:
    """Seconds of the stock module and of the swapped one, in turn."""
    stock, swapped = [], []
    with as_stock(part.module):
        stock_calls = clock.calls(part.run)
    swapped_calls = clock.calls(part.run)
    for _ in range(ROUNDS):
        swapped.append(clock.seconds(part.run, swapped_calls))
        with as_stock(part.module):
            stock.append(clock.seconds(part.run, stock_calls))
    return median(stock), median(swapped)


def _report(model: nn.Module, kept: dict[str, str]) -> SwapReport:
    report = SwapReport()
    for name, module in {**swapped_parts(model), **{name: model.get_submodule(name) for name in kept}}.items():
        report.classes[name] = type(module).__name__
        if name in kept:
            report.kept[name] = kept[name]
        else:
            report.swapped.append(name)
    return report
