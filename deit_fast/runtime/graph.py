"""Inference as CUDA graphs: all of a forward pass's launches at once, for batches too small to hide them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# Before a capture, on a stream beside: kernels compile, and libraries set up what they may not set up within one.
_WARM_UP = 3


class _Captured(NamedTuple):
    graph: object  # torch.cuda.CUDAGraph, or what stands for it in a test
    images: Tensor
    output: object


class GraphedModel:
    """`model(images)` from a CUDA graph, captured the first time a shape is seen; made by `deit_fast.graph`.

    The result is a copy: the next call does not change it. The weights are read where they are: a changed weight counts
    from the next call on, but one that another tensor has replaced does not, and neither does a hook added later.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.dtype, self.device = model, dtype, device
        self._captured: dict[torch.Size, _Captured] = {}

    def __call__(self, images: Tensor) -> object:
        """images: [B, C, H, W] of the example's dtype and device; any shape that the model takes.

        Raises:
            ValueError: the model is in training mode, or `images` are elsewhere.
            TypeError: `images` have another dtype.
        """
        captured = self._captured.get(images.shape)
        if self.model.training:
            raise ValueError("deit_fast.graph: the model is in training mode; call model.eval() first")
        if images.dtype is not self.dtype:
            raise TypeError(f"deit_fast.graph: captured for {self.dtype}, got {images.dtype}")
        if images.device != self.device:
            raise ValueError(f"deit_fast.graph: captured on {self.device}, got images on {images.device}")
        if captured is None:
            captured = self._captured[images.shape] = _capture(self.model, images)
        captured.images.copy_(images)
        captured.graph.replay()
        return tree_map_only(Tensor, torch.clone, captured.output)


def graph(model: nn.Module, example: Tensor) -> Callable[[Tensor], object]:
    """A callable like `model`, whose forward passes are replayed CUDA graphs: one launch each, whatever is in them.

    model: in eval mode, on a GPU; gradients are never computed. example: images [B, C, H, W], whose shape is captured
    now and whose dtype and device hold for all that follow; each further shape is captured when it is first seen, and
    its memory is kept.

    Raises:
        ValueError: the model is in training mode, or `example` is not on a GPU.
    """
    if example.device.type != "cuda":
        raise ValueError(f"deit_fast.graph: CUDA graphs need a GPU, the example is on {example.device}")
    graphed = GraphedModel(model, example.dtype, example.device)
    graphed(example)
    return graphed


def _capture(model: nn.Module, images: Tensor) -> _Captured:
    static = images.clone()
    with torch.cuda.device(images.device), torch.no_grad():
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                model(static)
        torch.cuda.current_stream().wait_stream(beside)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            output = model(static)
    return _Captured(captured, static, output)
