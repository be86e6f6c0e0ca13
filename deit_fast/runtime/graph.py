"""Inference as CUDA graphs: all of a forward pass's launches at once, for batches too small to hide them."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map_only

from deit_fast.runtime.apart import apart

# Before a capture, on a stream beside: kernels compile, and libraries set up what they may not set up within one.
_WARM_UP = 3
# CUDA takes one capture at a time; and a thread's images must not be another's before its graph has run.
_one_at_a_time = threading.RLock()
_PLAIN = (Tensor, Parameter)


class _Captured(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph, or what stands for it in a test
    images: Tensor
    output: object


class GraphedModel:
    """`model(images)` from a CUDA graph, captured the first time a shape is seen; made by `deit_fast.graph`.

    The result is a copy: the next call does not change it. Weights changed in place count from the next call on.
    Where a weight lies elsewhere than before, or a part of the model has come, gone, or changed its mode, all graphs
    are captured anew; so is one for another dtype of autocast or another precision of float32 products. All else is
    as it was when a graph was captured: hooks ran then, and don't run again. No gradients are computed, whether or
    not grad mode is on. Threads may share it, streams may not: a call must not start before the last one has ended.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._captured: dict[tuple, _Captured] = {}
        self._state: list[object] = []
        # While a graph lives, nothing else may lie where its weights were, or be taken for one of them.
        self._held: list[Tensor] = []

    def __call__(self, images: Tensor) -> object:
        """images: [B, C, H, W] of the example's dtype and device; any shape and strides that the model takes.

        Raises:
            ValueError: the model is in training mode, or `images` are elsewhere or want a gradient.
            TypeError: `images` have another dtype or are not in memory of their own (DTensor); or the model returns
                something that is neither tensors nor plain values, nor a container that PyTorch's pytrees know.
        """
        self._check(images)
        with _one_at_a_time, torch.no_grad():
            # No launch would be in such a graph.
            if images.numel() == 0:
                return self.model(images)
            output = self._replay(images)
            # Asked while the GPU works; what that graph read is still there.
            if self._state != _state_of(self.model):
                torch.cuda.synchronize(self.device)
                self._captured.clear()
                output = self._replay(images)
        return output

    def _check(self, images: Tensor) -> None:
        if self.model.training:
            raise ValueError("deit_fast.graph: the model is in training mode; call model.eval() first")
        if images.dtype is not self.dtype:
            raise TypeError(f"deit_fast.graph: captured for {self.dtype}, got {images.dtype}")
        if images.device != self.device:
            raise ValueError(f"deit_fast.graph: captured on {self.device}, got images on {images.device}")
        if images.requires_grad and torch.is_grad_enabled():
            raise ValueError("deit_fast.graph: no gradients are computed, but the images require one; detach() them")
        if type(images).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            raise TypeError(f"deit_fast.graph: takes images in memory of their own, got a {type(images).__name__}")

    def _replay(self, images: Tensor) -> object:
        key = images.shape, *_settings(self.device.type)
        captured = self._captured.get(key)
        if captured is None:
            captured = _capture(self.model, images)
            if not self._captured:
                self._state = _state_of(self.model)
                tensors = [*self.model.parameters(), *self.model.buffers()]
                self._held = [*tensors, *[tensor.detach() for tensor in tensors]]
            self._captured[key] = captured
        captured.images.copy_(images)
        captured.graph.replay()
        return tree_map_only(Tensor, torch.clone, captured.output)


def graph(model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    """A callable like `model`, whose forward passes are replayed CUDA graphs: one launch each, whatever is in them.

    model: in eval mode, on a GPU; gradients are never computed. example: images [B, C, H, W], whose shape is captured
    now and whose dtype and device hold for all that follow; each further shape is captured when it is first seen, and
    its memory is kept. Autocast and inference mode may be on or off, now and at each call.

    Raises:
        ValueError: the model is in training mode, or `example` is not on a GPU.
        TypeError: the result holds what no graph can write anew (`GraphedModel.__call__`).
    """
    if example.device.type != "cuda":
        raise ValueError(f"deit_fast.graph: CUDA graphs need a GPU, the example is on {example.device}")
    graphed = GraphedModel(model, example.dtype, example.device)
    graphed(example)
    return graphed


def _settings(device_type: str) -> tuple:
    """What decides, outside of the model, in which precision it computes."""
    return (
        torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # the module's class has it
    )


def _state_of(model: nn.Module) -> list[object]:
    """What graphs take for granted of a model: each module's mode, and where its tensors lie."""
    modules = [model]
    found: list[object] = []
    tensor: Any  # or None
    for module in modules:
        found.append(module.training)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            # The memory of a subclass may be anywhere.
            found.append(tensor.data_ptr() if type(tensor) in _PLAIN else id(tensor))
        modules += [part for part in module._modules.values() if part is not None]
    return found


def _capture(model: nn.Module, images: Tensor) -> _Captured:
    with torch.cuda.device(images.device), apart(), torch.no_grad():
        static = images.as_subclass(Tensor).clone()
        beside, within = torch.cuda.Stream(), torch.cuda.Stream()
        current = torch.cuda.current_stream()
        beside.wait_stream(current)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                model(static)
        current.wait_stream(beside)
        captured = torch.cuda.CUDAGraph()
        # A stream of this device, which PyTorch's own for captures may not be, and of no other graph: cuBLAS's
        # workspace goes with the stream. Entered here too, since a capture that fails may not leave it.
        with (
            torch.cuda.stream(within),
            # What other threads do meanwhile, a data loader's for one, does not end the capture.
            torch.cuda.graph(captured, stream=within, capture_error_mode="thread_local"),
        ):
            output = model(static)
    for leaf in tree_leaves(output):
        if not isinstance(leaf, Tensor | bool | int | float | str | None):
            raise TypeError(f"deit_fast.graph: the model returns a {type(leaf).__name__}, which can't be copied")
    return _Captured(captured, static, output)
