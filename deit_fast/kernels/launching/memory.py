"""Memory of a GPU, past PyTorch's dispatcher: of plans, and of kernels that ask Triton's launcher for some."""

import contextvars
from collections.abc import Callable

import torch
import triton
from torch import Tensor


def allocator(device: torch.device) -> Callable[..., Tensor]:
    """`empty_strided` of size, stride and dtype on `device`, the current one: by what Inductor's code calls, past the
    dispatcher and in half the time, where PyTorch has that.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return quick or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device))


def with_scratch(launch: Callable) -> Callable:
    """`launch`, of a kernel that may build tensor descriptors: it writes them to memory that Triton's launcher asks
    `triton.set_allocator`'s function for.

    That function is a thread's, and the program may have set its own, so ours is set for each launch anew.
    """

    def launched(*arguments: object, **options: object) -> object:
        return contextvars.copy_context().run(_launched, launch, arguments, options)

    return launched


def _launched(launch: Callable, arguments: tuple, options: dict) -> object:
    triton.set_allocator(_scratch)
    return launch(*arguments, **options)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    # PyTorch aligns to 512 bytes, and gives the memory to nobody else before the stream is past the launch.
    return allocator(torch.device("cuda"))((size,), (1,), torch.int8)
