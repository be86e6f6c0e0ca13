"""Counting what a model asks of the dispatcher."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        # By storage and not by schema: `_unsafe_view` does not say that it is a view.
        inputs, outputs = _storages((args, kwargs)), _storages(result)
        is_view = outputs <= inputs and not func._schema.is_mutable
        self.count += not is_view and func._schema.name not in _ALLOCATIONS
        return result


def _storages(tree: object) -> set[int]:
    tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def operator_calls(function: Callable[[], object]) -> int:
    """How many operators `function` calls, views and bare allocations left out."""
    with _Counter() as counter:
        function()
    return counter.count
