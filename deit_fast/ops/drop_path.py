"""Stochastic depth that skips what it drops (Huang et al. 2016): which samples a branch is computed for.

`kept` [1 + B] int32 goes with the factors [B] of one branch: how many samples are kept, their indices in ascending
order, then those of the dropped ones. Between where a branch reads the residual stream and where it writes it, its
tensors are packed: kept sample i is at place i. Where the count must not be read by the host, they have room for all
samples, and what lies past the kept ones is never read.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from deit_fast.kernels import drop_path as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import PerSample
from deit_fast.ops.backend import exporting, use_triton
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.operator import Operator


class _KeepSamples(Operator):
    name = "keep_samples"
    launcher = staticmethod(kernels.keep_samples)
    data = ("drop_path_scale",)
    data_outputs = (0,)

    @staticmethod
    def stock(drop_path_scale: PerSample) -> Tensor:
        dropped = drop_path_scale == 0
        order = dropped.to(torch.uint8).argsort(stable=True)
        return torch.cat((dropped.shape[0] - dropped.sum(0, keepdim=True), order)).to(torch.int32)

    def check(self, a: Any) -> None:
        checks.floating(self.name, "drop_path_scale", a.drop_path_scale)
        if a.drop_path_scale.ndim != 1:
            shape = tuple(a.drop_path_scale.shape)
            raise ValueError(f"deit_fast.keep_samples: drop_path_scale must have shape (batch,), got {shape}")

    def unsupported(self, a: Any) -> str | None:
        return checks.kernel_dtypes(a.drop_path_scale)

    def fake(self, a: Any) -> Tensor:
        return a.drop_path_scale.new_empty((1 + a.drop_path_scale.shape[0],), dtype=torch.int32)

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        return ()

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        yield Example("", {"drop_path_scale": new.drop_path_scale()})


_keep_samples = _KeepSamples()


def keep_samples(drop_path_scale: Tensor) -> Tensor:
    """Factors [B], 0 for the dropped samples → `kept` [1 + B] int32, without a word to the host."""
    return _keep_samples(drop_path_scale)


def check_kept(op: str, x: Tensor, kept: Tensor | None) -> None:
    """`kept` must fit `x` [B, ...]."""
    if kept is None:
        return
    if kept.dtype is not torch.int32 or kept.shape != (1 + x.shape[0],):
        raise ValueError(
            f"deit_fast.{op}: kept must be int32 of shape ({1 + x.shape[0]},) for a batch of {x.shape[0]} "
            f"(keep_samples), got {kept.dtype} {tuple(kept.shape)}"
        )
    checks.same_device(op, x, kept=kept)


def check_packed(op: str, packed: Tensor, kept: Tensor | None) -> None:
    """`kept` must fit a packed tensor: be of a batch no smaller than what it has room for."""
    if kept is None:
        return
    if kept.dtype is not torch.int32 or kept.ndim != 1 or kept.shape[0] <= packed.shape[0]:
        raise ValueError(
            f"deit_fast.{op}: kept must be int32 of shape (1 + batch,) for a batch of {packed.shape[0]} or more "
            f"(keep_samples), got {kept.dtype} {tuple(kept.shape)}"
        )
    checks.same_device(op, packed, kept=kept)


def check_capacity(op: str, x: Tensor, kept: Tensor | None, capacity: int | None) -> None:
    if kept is not None and (capacity is None or not 0 <= capacity <= x.shape[0]):
        raise ValueError(f"deit_fast.{op}: capacity must be from 0 to the batch of {x.shape[0]}, got {capacity}")


def known_count(kept: Tensor) -> int | None:
    """How many samples are kept, where asking stops nobody: on the CPU path, unless a graph is being traced."""
    if kept.device.type == "cpu" and not use_triton(kept) and type(kept) is Tensor and not is_compiling():
        return int(kept[0])
    return None


def capacity(kept: Tensor) -> int:
    """For how many samples packed tensors need room."""
    known = known_count(kept)
    return kept.shape[0] - 1 if known is None else known


# Stock operators ----------------------------------------------------------------------------------------------------
#
# A CPU may read the count, and computes no more. On a GPU all of the room is computed, dropped samples as zeros.


def gather(x: Tensor, kept: Tensor | None, capacity: int | None) -> Tensor:
    """The kept samples of x [B, ...], packed: on a CPU those alone, else with room for `capacity`."""
    if kept is None:
        return x
    places = int(kept[0]) if _reads_count(kept) else capacity or 0
    return filled(x.index_select(0, kept[1 : 1 + places]), kept)


def filled(packed: Tensor, kept: Tensor | None) -> Tensor:
    """The kept samples of a packed tensor that may have room for more: on a CPU those alone, else zeros after them."""
    if kept is None:
        return packed
    if _reads_count(kept):
        return packed[: int(kept[0])]
    is_kept = torch.arange(packed.shape[0], device=kept.device) < kept[0]
    return packed.where(is_kept.view(-1, *[1] * (packed.ndim - 1)), 0)


def with_room(packed: Tensor, capacity: int) -> Tensor:
    """`packed`, with room for `capacity` samples."""
    if packed.shape[0] == capacity:
        return packed
    roomy = packed.new_empty((capacity, *packed.shape[1:]))
    roomy[: packed.shape[0]] = packed
    return roomy


def scatter(packed: Tensor, kept: Tensor | None, batch: int) -> Tensor:
    """The kept samples back at their places among `batch`, zeros at the others'."""
    if kept is None:
        return packed
    full = packed.new_zeros((batch, *packed.shape[1:]))
    return full.index_copy_(0, kept[1 : 1 + packed.shape[0]].long(), filled(packed, kept))


def _reads_count(kept: Tensor) -> bool:
    return kept.is_cpu and not exporting()
