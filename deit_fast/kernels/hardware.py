"""What GPUs are to the kernels: whose launch settings one takes, and what it can't multiply.

Settings are made for `KNOWN`. A GPU in `ALIKE` takes those of the named one: the nearest before it with the same matrix
instructions and no more shared memory, for which a block's launches compile without spills.

On all others the stock operators run. Older ones (sm_75, gfx906, gfx1030) have no matrix instructions that Triton
compiles to, and it multiplies without, many times slower than stock. gfx1100's launches spill with gfx1200's settings.
Later ones stay with stock until somebody has compiled for them: the compiler may end the process on a GPU that it
doesn't know (as LLVM does on sm_88), and stock is never slower than itself.
"""

from functools import lru_cache

import torch
from triton.runtime import driver

KNOWN = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1200")
ALIKE = {
    "sm_87": "sm_86",
    "sm_103": "sm_100",
    "sm_110": "sm_100",  # Triton 3.6 does not compile for it
    "sm_121": "sm_120",
    "gfx1201": "gfx1200",
}

# About 100 KiB of shared memory a program (64 on AMD): two stages of a 16-bit tile, not three.
SMALL_SHARED_MEMORY = frozenset({"sm_86", "sm_89", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1200"})
# Dots compile to mma.sync, which holds its operands in registers; wgmma and tcgen05 read them from shared memory.
MMA_SYNC = frozenset({"sm_80", "sm_86", "sm_89", "sm_120"})
WAVES_OF_64 = frozenset({"gfx90a", "gfx942", "gfx950"})
# 256 registers a lane, and lanes half as many as of the other AMD GPUs: a tile takes twice what it takes there.
WAVES_OF_32 = frozenset({"gfx1200"})
NO_FLOAT32_PRODUCTS = frozenset({"gfx1200"})
# The longest row whose read-out queries fit in a wave's registers, where the others' do not.
NARROW_READOUT = {"gfx1200": 192}

# Why the stock operators answer on devices that this process has met, beside what else they answer for.
lacking: set[str] = set()


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def architecture(device: torch.device) -> str:
    """What this device is: `sm_90`, `gfx942`, …"""
    return _of_gpu(device.index) if device.type == "cuda" else _of_stand_in(driver.active)


@lru_cache(maxsize=64)
def _of_gpu(index: int) -> str:
    # Of this one: Triton's driver answers for the current one.
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]  # gfx90a:sramecc+:xnack-
    return f"sm_{properties.major}{properties.minor}"


@lru_cache(maxsize=64)
def _of_stand_in(active_driver: object) -> str:
    """Where the CPU takes a GPU's place."""
    arch = active_driver.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"


def family(arch: str) -> str | None:
    """The architecture whose settings `arch` takes, or None."""
    return arch if arch in KNOWN else ALIKE.get(arch)
