"""The end of step 3: a block under what users put around it, on the device itself. Every function says what differs."""

from typing import Any

import torch
from torch import Tensor

from deit_fast.benchmark.clock import captured
from deit_fast.benchmark.gpu.blocks import Shape, steps
from deit_fast.check.accuracy import STOCK_FACTOR, relative_error
from deit_fast.kernels.launching import replay

# Of the plain block's float32 result: float16 has 11 bits, and a block's gradients sum many roundings.
_CLOSE = 2e-2


def repeated_from_plans(device: torch.device, shape: Shape) -> dict[str, object]:
    """Launches repeated from plans against launches made anew, bit for bit."""
    _, step = steps(shape, device)
    with replay.enabled(False):
        anew = _copies(step())
    step()
    return _same(anew, _copies(step()))


def repeated(device: torch.device, shape: Shape) -> dict[str, object]:
    """The same step three times, bit for bit."""
    _, step = steps(shape, device)
    first, *others = (_copies(step()) for _ in range(3))
    return {"different": sorted({name for other in others for name in _same(first, other)["different"]})}


def in_a_graph(device: torch.device, shape: Shape) -> dict[str, object]:
    """A CUDA graph of the step against the step, bit for bit."""
    _, step = steps(shape, device)
    expected = _copies(step())
    graph, found = captured(step)
    for tensor in found:
        tensor.zero_()
    graph.replay()
    return _same(expected, _copies(found))


def on_a_side_stream(device: torch.device, shape: Shape) -> dict[str, object]:
    """The step on another stream than the current one, bit for bit."""
    _, step = steps(shape, device)
    expected = _copies(step())
    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        found = step()
    beside.synchronize()
    return _same(expected, _copies(found))


def scaled_autocast(device: torch.device, shape: Shape) -> dict[str, object]:
    """Gradients under float16 autocast and GradScaler, of float32 weights: relative errors, stock's beside ours."""
    stock, ours = steps(shape, device)
    expected = _copies(stock())
    errors = {}
    for name, step in (("stock", stock), ("ours", ours)):
        # What comes back must fit float16: GradScaler's own 65536 is for a loss's small gradients.
        scaler = torch.amp.GradScaler(device.type, init_scale=16.0)
        optimizer = torch.optim.SGD(step.block.parameters(), lr=0.0)
        with torch.autocast(device.type, torch.float16):
            loss = (step.block(step.x).float() * step.gradient).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        found: list[Any] = [parameter.grad for parameter in step.block.parameters()]
        # The key's bias has no gradient but rounding, and lies in qkv's.
        errors[name] = max(map(relative_error, found, expected[2:]))
        step.x.grad = None
    return {
        "relative error": errors,
        "different": [] if errors["ours"] <= max(_CLOSE, STOCK_FACTOR * errors["stock"]) else ["ours"],
    }


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _same(expected: list[Tensor], found: list[Tensor]) -> dict[str, Any]:
    names = ["output", "d x", *(f"d parameter {i}" for i in range(len(expected) - 2))]
    return {
        "different": [
            name
            for name, a, b in zip(names, expected, found, strict=False)
            if not torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        ]
    }
