"""Launches on tensors of more than 2³¹ elements, of which the last programs alone are run.

The memory is taken a page at a time, as it is touched; the rest of such a tensor reads as zeros.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

from deit_fast.kernels.launching import run

# Elements that an offset can be off by when it wraps around in 32 bits.
_WRAPPED = 2**31
# Linux's; Python has the name since 3.13.
_MAP_NORESERVE = 0x4000


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """With as much before it, so that an offset that has wrapped around is a wrong value and not a crash."""
    before, size = _WRAPPED * dtype.itemsize, prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, before + size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=before).view(shape)


@contextmanager
def last_programs(count: int) -> Iterator[list[str]]:
    """Of every launch within, only the last `count` programs run, and outputs are `zeros`. The kernels launched."""
    names: list[str] = []
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_dim, set_idx, empty = builder.set_grid_dim, builder.set_grid_idx, torch.empty

    def run_last(kernel, programs: int, device: torch.device, *args, **options) -> None:
        names.append(kernel.__name__)
        assert programs < 2**31, "more programs than a grid's first axis has room for"
        first = max(0, programs - count)
        with (
            mock.patch.object(builder, "set_grid_dim", lambda *_: set_dim(programs, 1, 1)),
            mock.patch.object(builder, "set_grid_idx", lambda x, *_: set_idx(first + x, 0, 0)),
            # Else the interpreter copies whole storages.
            mock.patch.object(executor, "_init_args_hst", lambda self, args, options: (args, options)),
            mock.patch.object(executor, "_restore_args_dev", lambda *_: None),
        ):
            kernel[(programs - first,)](*args, **options)

    def large_empty(*args, **options) -> Tensor:
        like = empty(*args, **options | {"device": "meta"})
        return zeros(tuple(like.shape), like.dtype) if like.numel() else empty(*args, **options)

    def large_empty_like(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        order = range(x.ndim)
        if memory_format is torch.preserve_format:
            order = sorted(order, key=x.stride, reverse=True)
        dense = zeros(tuple(x.shape[i] for i in order), x.dtype)
        return dense.permute([order.index(i) for i in range(x.ndim)])

    with (
        mock.patch.object(run, "run", run_last),
        mock.patch.object(torch, "empty", large_empty),
        mock.patch.object(torch, "empty_like", large_empty_like),
    ):
        yield names
