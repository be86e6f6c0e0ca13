"""Launch settings of attention, by shape, dtype and architecture."""

from typing import NamedTuple

from deit_fast.kernels.launching.hardware import MMA_SYNC, SMALL_SHARED_MEMORY, WAVES_OF_32, is_amd
from deit_fast.kernels.launching.settings import setting


class AttentionTile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


@setting("attention")
def attention(head_dim: int, itemsize: int, arch: str) -> AttentionTile:
    if itemsize == 4:
        if arch in MMA_SYNC:
            # Three TF32 products for one leave no registers for wider tiles.
            return AttentionTile(16, 32, 4, 1)
        return AttentionTile(64, 32, 8 if arch == "sm_100" else 4, 1)
    if head_dim > 96 and arch in MMA_SYNC:
        # The queries' tail takes the registers of wider tiles.
        return AttentionTile(32, 32, 4, 2)
    keys = 32 if head_dim > 96 and arch in WAVES_OF_32 else 64
    return AttentionTile(64, keys, 4, 1 if is_amd(arch) else 2)


@setting("attention_backward")
def attention_backward(head_dim: int, itemsize: int, arch: str) -> tuple[AttentionTile, AttentionTile]:
    """Tiles of the kernel that owns queries and of the one that owns keys.

    16 rows a warp: more warps than that compute the same rows again, except where the dots are tcgen05's.
    """
    if itemsize == 2:
        if head_dim > 64 and arch in WAVES_OF_32:
            # Two waves share 16 rows, each with half of the accumulators.
            num_warps = 8 if head_dim > 80 else 4
            return AttentionTile(64, 16 if head_dim > 96 else 32, 4, 1), AttentionTile(16, 64, num_warps, 1)
        stages = 1 if is_amd(arch) else 2
        # A second stage of heads this narrow costs sm_80 eight bytes of spilled registers.
        of_keys = AttentionTile(32, 64, 4, 1 if head_dim == 32 and arch == "sm_80" else stages)
        return AttentionTile(64, 32, 4, stages), of_keys
    if head_dim > 80 and not is_amd(arch):
        # Split into what TF32 multiplies, 64 rows this wide fit neither in registers nor in shared memory.
        return AttentionTile(16, 32, 4, 1), AttentionTile(32, 16, 4, 1)
    if head_dim == 32 and arch == "sm_120":
        # 32 keys spill 24 bytes.
        return AttentionTile(64, 16, 4, 1), AttentionTile(32, 16, 4, 1)
    num_warps = 8 if arch == "sm_100" else 4
    # There 64 keys spill, if only just.
    keys = 32 if arch in MMA_SYNC & SMALL_SHARED_MEMORY else 64
    return AttentionTile(64, 16, num_warps, 1), AttentionTile(16, keys, num_warps, 1)
