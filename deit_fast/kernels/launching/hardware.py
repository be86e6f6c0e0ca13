"""What GPUs are to the kernels: whose launch settings one takes, and what it can't multiply.

Settings are made for `KNOWN`. A GPU in `ALIKE` takes those of the named one: the nearest before it with the same matrix
instructions and no more shared memory, for which a block's launches compile without spills.

On all others the stock operators run. Older ones (sm_75, gfx906, gfx1030) have no matrix instructions that Triton
compiles to, and it multiplies without, many times slower than stock. gfx1100's launches spill with gfx1200's settings.
Later ones stay with stock until somebody has compiled for them: the compiler may end the process on a GPU that it
doesn't know (as LLVM does on sm_88), and stock is never slower than itself.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
import triton
from triton.runtime import driver

from deit_fast.kernels.launching import tf32

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The interpreter is quickest with the largest tiles.
_INTERPRETED_AS = "sm_90"

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
# Tiles of 16 bits by a tensor's descriptor (TMA): a copy engine finds their addresses, not the program's threads.
TENSOR_DESCRIPTORS = frozenset({"sm_90", "sm_100", "sm_120"})
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


def native_architecture(device: torch.device) -> str:
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
def _of_stand_in(active_driver: Any) -> str:
    """Where the CPU takes a GPU's place."""
    arch = active_driver.get_current_target().arch
    return arch if isinstance(arch, str) else f"sm_{arch}"


def family(arch: str) -> str | None:
    """The architecture whose settings `arch` takes, or None."""
    return arch if arch in KNOWN else ALIKE.get(arch)


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


def architecture(tensor: torch.Tensor) -> str:
    """`sm_90`, `gfx942`, …: the one whose settings this tensor's device takes."""
    return architecture_of(tensor.device)


def architecture_of(device: torch.device) -> str:
    if interpreted():
        return _INTERPRETED_AS
    arch = native_architecture(device)
    return family(arch) or arch


@lru_cache(maxsize=64)
def _multiprocessors(active_driver: Any, device: int | None) -> int:
    return active_driver.utils.get_device_properties(device or 0)["multiprocessor_count"]


def multiprocessors(tensor: torch.Tensor) -> int:
    """Of this tensor's device."""
    return 108 if interpreted() else _multiprocessors(driver.active, tensor.device.index)


def device_name(device: torch.device) -> str:
    """NVIDIA H100 80GB HBM3; the architecture where a stand-in takes a GPU's place."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return native_architecture(device)


@lru_cache(maxsize=1)
def driver_version() -> str:
    """Of the interface to CUDA's driver, 12080, or of ROCm; "none" where there is no driver."""
    if torch.version.hip:
        return torch.version.hip
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "none"
    return str(version.value)


def no_kernels(tensor: torch.Tensor) -> str | None:
    """Why no kernel runs on this tensor's device, or None."""
    arch = _name(tensor)
    return None if arch is None or family(arch) else _lacking(f"no kernels for {arch}")


def no_products(weight: torch.Tensor) -> str | None:
    """Why no kernel multiplies matrices of weight's dtype on its device, or None."""
    arch = _name(weight)
    if weight.dtype is torch.float32 and arch is not None and family(arch) in NO_FLOAT32_PRODUCTS:
        return _lacking(f"{arch} has no matrix instructions for float32")
    return no_kernels(weight)


def _name(tensor: torch.Tensor) -> str | None:
    """Of its device; None in the interpreter, and where Triton has no driver, as the launch will say."""
    try:
        return None if interpreted() else native_architecture(tensor.device)
    except RuntimeError:
        return None


def _lacking(reason: str) -> str:
    lacking.add(reason)
    return reason


def no_separate_projections(weight: torch.Tensor) -> str | None:
    """Why no kernel takes q, k and v as three projections, by choosing among their pointers, or None."""
    if _TRITON < (3, 7) and not interpreted() and is_amd(architecture(weight)):
        return f"Triton {triton.__version__} does not compile three projections in one for AMD GPUs; Triton 3.7 does"
    return None


def splits_float32(tensor: torch.Tensor) -> bool:
    """Whether float32 products on this tensor's device are split into several of TF32."""
    return not interpreted() and not is_amd(architecture(tensor)) and not tf32.is_allowed()


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 dots run: TF32 only where the user allowed it, else three TF32 products that restore float32.

    AMD's matrix cores multiply float32 as it is.
    """
    if dtype is not torch.float32 or is_amd(arch):
        return "ieee"
    return "tf32" if tf32.is_allowed() else "tf32x3"
