"""Guard bands: memory around a tensor whose bit pattern must survive a kernel.

The interpreter loads and stores through raw addresses and never notices a wrong one. A tensor in guard bands
shows a store outside it (the pattern has changed), a store into an input (its contents have), and a load
outside an input (the pattern is NaN in every float dtype, and reaches the result).

    guard = Guard()
    x = guard(x)                    # an equal tensor inside bands, strides kept
    with guard.outputs():           # what launchers allocate lies inside bands too
        y = op(x)
    guard.assert_untouched()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

# Wider than any tile a kernel could be off by along a row; a multiple of every alignment in use.
BAND_BYTES = 256 * 1024
# NaN in every float dtype: around inputs, and in outputs until they are written.
NAN_BYTE = 0xFF
# Around outputs: a NaN loaded past an input and stored past an output would leave NaN as it was.
OUTPUT_BAND_BYTE = 0xA5


@dataclass
class _Banded:
    name: str
    tensor: Tensor
    memory: Tensor  # uint8, everything: bands, gaps between strided elements, contents
    outside: Tensor  # bool by byte: not the tensor's
    expected: Tensor  # memory as it must stay: an input's everywhere, an output's outside it
    is_output: bool


class Guard:
    """Keeps every tensor it has put into guard bands, and checks them all."""

    def __init__(self) -> None:
        self._banded: list[_Banded] = []

    def __call__(self, tensor: Tensor, name: str = "input") -> Tensor:
        """A tensor of the same values, shape, strides, alignment and `requires_grad` inside guard bands."""
        banded = self._place(tensor, name, is_output=False)
        # Expanded dimensions hold each element once.
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        with torch.no_grad():
            banded.tensor[once].copy_(tensor[once])
        banded.expected.copy_(banded.memory)
        return banded.tensor.requires_grad_(tensor.requires_grad)

    @contextmanager
    def outputs(self) -> Iterator[None]:
        """Within, `torch.empty` and its relatives allocate CPU tensors inside guard bands."""

        def banded(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def wrapper(*args, **kwargs) -> Tensor:
                like = allocate(*args, **kwargs)
                if type(like) is not Tensor or like.device.type != "cpu" or not like.numel():
                    return like
                banded = self._place(like, "output", is_output=True)
                return banded.tensor.requires_grad_(like.requires_grad)

            return wrapper

        with (
            mock.patch.object(torch, "empty", banded(torch.empty)),
            mock.patch.object(torch, "empty_like", banded(torch.empty_like)),
            mock.patch.object(torch, "empty_strided", banded(torch.empty_strided)),
            mock.patch.object(Tensor, "new_empty", banded(Tensor.new_empty)),
        ):
            yield

    @property
    def output_count(self) -> int:
        """How many outputs lie in bands: 0 would mean that nothing was checked."""
        return sum(banded.is_output for banded in self._banded)

    def assert_untouched(self) -> None:
        """Fails if a byte outside any tensor, or inside an input, has changed."""
        for banded in self._banded:
            changed = banded.memory != banded.expected
            outside = changed & banded.outside
            if outside.any():
                self._fail("outside", banded, outside)
            if changed.any() and not banded.is_output:
                self._fail("inside", banded, changed)

    @staticmethod
    def _fail(where: str, banded: _Banded, changed: Tensor) -> None:
        tensor = banded.tensor
        offset = int(changed.int().argmax()) - tensor.storage_offset() * tensor.element_size()
        raise AssertionError(
            f"a kernel wrote {where} {banded.name} {tuple(tensor.shape)} (strides {tensor.stride()}, "
            f"{tensor.dtype}): {int(changed.sum())} bytes, first at byte {offset} from its start"
        )

    def _place(self, like: Tensor, name: str, is_output: bool) -> _Banded:
        size = like.element_size()
        # As far from a 16-byte boundary as `like`.
        start = BAND_BYTES + like.data_ptr() % 16
        extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
        band_byte = OUTPUT_BAND_BYTE if is_output else NAN_BYTE
        memory = torch.full((start + max(extent, 0) * size + BAND_BYTES,), band_byte, dtype=torch.uint8)
        outside = torch.ones_like(memory, dtype=torch.bool)
        if like.numel():
            by_byte = (*like.shape, size), (*(stride * size for stride in like.stride()), 1), start
            outside.as_strided(*by_byte).fill_(False)
            memory.as_strided(*by_byte).fill_(NAN_BYTE)
        # Not a view of `memory`, so that autograd sees a leaf.
        tensor = torch.tensor([], dtype=like.dtype)
        tensor.set_(memory.untyped_storage(), start // size, like.shape, like.stride())
        self._banded.append(_Banded(name, tensor, memory, outside, memory.clone(), is_output))
        return self._banded[-1]
