"""The GPUs that kernels are compiled for ahead of time, and what each allows one program."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

KIB = 1024


@dataclass(frozen=True)
class Target:
    """name: as compilers call it. shared_memory: bytes one program may have. registers: 32-bit, a thread."""

    name: str
    gpu: GPUTarget
    shared_memory: int
    registers: int
    multiprocessors: int


def _cuda(capability: int, shared_memory_kib: int, multiprocessors: int) -> Target:
    gpu = GPUTarget("cuda", capability, 32)
    return Target(f"sm_{capability}", gpu, shared_memory_kib * KIB, 255, multiprocessors)


def _hip(arch: str, warp_size: int, shared_memory_kib: int, registers: int, multiprocessors: int) -> Target:
    gpu = GPUTarget("hip", arch, warp_size)
    return Target(arch, gpu, shared_memory_kib * KIB, registers, multiprocessors)


# Shared memory: CUDA C++ programming guide, "maximum amount of shared memory per thread block"; AMD: LDS.
# Registers: on CDNA vector and accumulation registers together. Multiprocessors: of the card named.
TARGETS = {
    target.name: target
    for target in (
        _cuda(80, 163, 108),  # A100
        _cuda(86, 99, 82),  # RTX 3090
        _cuda(89, 99, 128),  # RTX 4090
        _cuda(90, 227, 132),  # H100
        _cuda(100, 227, 148),  # B200
        _cuda(120, 99, 170),  # RTX 5090
        _hip("gfx90a", 64, 64, 512, 104),  # MI250X, one die
        _hip("gfx942", 64, 64, 512, 304),  # MI300X
        _hip("gfx950", 64, 160, 512, 256),  # MI355X
        _hip("gfx1200", 32, 64, 256, 32),  # RX 9060 XT
    )
}
