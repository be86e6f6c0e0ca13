"""Counting what autograd keeps for backward."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, function: Callable[[], object]) -> int:
    """Bytes of the distinct storages that `function` saves for backward, `model`'s parameters and buffers apart."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # holds the tensors, lest a storage's identity be used again

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = function()
    del result
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known)
