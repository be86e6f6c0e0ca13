"""The GPUs that kernels are compiled for ahead of time, and what each allows one program."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """What one program may take, and what the programs of one multiprocessor share.

    name: as compilers call it. shared_memory: bytes one program may have. registers: 32-bit, a thread.
    all_shared_memory: bytes of a multiprocessor. warps, programs: the most that a multiprocessor holds at once.
    """

    name: str
    gpu: GPUTarget
    shared_memory: int
    registers: int
    multiprocessors: int
    all_shared_memory: int
    warps: int
    programs: int

    @property
    def is_amd(self) -> bool:
        return self.gpu.backend == "hip"


def _cuda(capability: int, shared_memory_kib: int, warps: int, programs: int, multiprocessors: int) -> Target:
    gpu = GPUTarget("cuda", capability, 32)
    # The system keeps 1 KiB for itself, of every program.
    shared, all_shared = shared_memory_kib * KIB, (shared_memory_kib + 1) * KIB
    return Target(f"sm_{capability}", gpu, shared, 255, multiprocessors, all_shared, warps, programs)


def _hip(arch: str, warp_size: int, shared_memory_kib: int, registers: int, warps: int, multiprocessors: int) -> Target:
    gpu = GPUTarget("hip", arch, warp_size)
    shared = shared_memory_kib * KIB
    all_shared = 2 * shared if warp_size == 32 else shared
    return Target(arch, gpu, shared, registers, multiprocessors, all_shared, warps, warps)


# NVIDIA: CUDA C++ programming guide, technical specifications by compute capability. AMD: the instruction set
# manuals; registers are vector and, on CDNA, accumulation registers together; RDNA's multiprocessor is a workgroup
# processor. Multiprocessors: of the card named.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 163, 64, 32, 108),  # A100
        _cuda(86, 99, 48, 16, 82),  # RTX 3090
        _cuda(89, 99, 48, 24, 128),  # RTX 4090
        _cuda(90, 227, 64, 32, 132),  # H100
        _cuda(100, 227, 64, 32, 148),  # B200
        _cuda(120, 99, 48, 24, 170),  # RTX 5090
        _hip("gfx90a", 64, 64, 512, 32, 104),  # MI250X, one die
        _hip("gfx942", 64, 64, 512, 32, 304),  # MI300X
        _hip("gfx950", 64, 160, 512, 32, 256),  # MI355X
        _hip("gfx1200", 32, 64, 256, 64, 32),  # RX 9060 XT
    )
}
