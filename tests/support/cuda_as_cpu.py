"""The CPU wherever a GPU is asked for, with swapped modules that do not mind."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from deit_fast.swap import rules


class _CudaAsCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(
            torch.device, lambda device: torch.device("cpu") if device.type == "cuda" else device, (args, kwargs or {})
        )
        return function(*args, **kwargs)


@contextmanager
def cuda_as_cpu() -> Iterator[None]:
    # A swapped module leaves the work to stock under a mode that it doesn't know.
    with mock.patch.object(rules, "_overridden", lambda modes: False), _CudaAsCpu():
        yield
