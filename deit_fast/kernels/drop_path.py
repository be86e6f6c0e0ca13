"""Which samples drop path keeps, found on the device: the host never waits to learn how many."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import dense
from deit_fast.kernels.launching.metadata import described

_BLOCK = 1024


@triton.jit(**described("keep_samples_kernel", lambda a: (a["batch"],)))
def keep_samples_kernel(
    drop_path_scale_ptr,  # [batch]
    kept_ptr,  # [1 + batch], int32
    batch,
    BLOCK: tl.constexpr,
):
    """`kept = [count, the samples with a scale, the others]`: a stable partition by prefix sums.

    One program, so that a sample's place is a running count.
    """
    kept = 0
    for start in range(0, batch, BLOCK):
        kept += tl.sum(_is_kept(drop_path_scale_ptr, start, batch, BLOCK), axis=0)
    tl.store(kept_ptr, kept)
    kept_before = 0
    for start in range(0, batch, BLOCK):
        sample = start + tl.arange(0, BLOCK)
        is_kept = _is_kept(drop_path_scale_ptr, start, batch, BLOCK)
        place = kept_before + tl.cumsum(is_kept, axis=0) - is_kept
        place = tl.where(is_kept != 0, place, kept + sample - place)
        tl.store(kept_ptr + 1 + place, sample, mask=sample < batch)
        kept_before += tl.sum(is_kept, axis=0)


@triton.jit
def _is_kept(drop_path_scale_ptr, start, batch, BLOCK: tl.constexpr):
    sample = start + tl.arange(0, BLOCK)
    scale = tl.load(drop_path_scale_ptr + sample, mask=sample < batch, other=0.0).to(tl.float32)
    return (scale != 0.0).to(tl.int32)


def keep_samples(drop_path_scale: Tensor) -> Tensor:
    """`kept`, int32 [1 + B], of drop path's scales [B], where 0 drops a sample.

    kept[0]: how many samples are kept; kept[1:]: their indices, ascending, then those of the dropped, ascending.

    Kernels that are given it find kept sample i as row block i of a packed tensor, [capacity, N, …] with any
    capacity ≥ kept[0], and as row block kept[1 + i] of a full one, [B, N, …]. What a packed tensor holds beyond
    kept[0] is never read, and never written but by a product of the vendor's (vendor_gemm.py).
    """
    batch = drop_path_scale.shape[0]
    kept = torch.empty(1 + batch, dtype=torch.int32, device=drop_path_scale.device)
    block = min(_BLOCK, triton.next_power_of_2(max(batch, 16)))
    run.run(keep_samples_kernel, 1, kept.device, dense(drop_path_scale), kept, batch, BLOCK=block, num_warps=4)
    return kept
