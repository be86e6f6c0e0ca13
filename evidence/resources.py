"""What a compiled kernel takes of a GPU: registers, spills, shared memory, instructions, and how many programs fit."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

from deit_fast.check.targets import KIB, Target
from evidence.accesses import wide

_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)|\bv_(mfma|smfmac|wmma|swmmac)_", re.MULTILINE)
# Of an ELF section: its type, and the flag of code.
_PROGBITS, _EXECUTABLE = 1, 4
# `#mma = #ttg.nvidia_mma<…>`: a layout that a tensor-core instruction produces.
_MMA_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma|amd_wmma)<", re.MULTILINE)
# `tt.dot %a, %b, %c … : tensor<64x32xbf16, …> * … -> tensor<64x64xf32, #blocked>`: still a plain dot.
_DOT = re.compile(r"\btt\.dot .*? : tensor<[\dx]+x(\w+), .*-> tensor<[^#]*(#\w+)>")


@dataclass(frozen=True)
class Resources:
    """Of one program. registers: a thread. spilled, shared_memory, code: bytes (spilled: a thread).

    programs: how many a multiprocessor holds at once, by registers, shared memory and warps.
    tensor_core: instruction kinds and how often each stands in the assembly.
    dots: `tl.dot`s in the kernel, before loops are unrolled; scalar_dots: those of 16-bit operands that
    became multiply-adds without tensor cores. widest_store: bytes a thread stores at once.
    wide_loads, wide_stores: the share of bytes in accesses of global memory that are 128 bits wide; None where there
    are no accesses.
    """

    registers: int
    spilled: int
    shared_memory: int
    programs: int
    code: int
    tensor_core: dict[str, int]
    dots: int
    scalar_dots: int
    widest_store: int
    wide_loads: float | None
    wide_stores: float | None


def resources(kernel: CompiledKernel, target: Target) -> Resources:
    """Reads them from what `kernel` was compiled to, with the tools that Triton carries."""
    warps, shared_memory = kernel.metadata.num_warps, kernel.metadata.shared
    if target.is_amd:
        assembly, binary = kernel.asm["amdgcn"], kernel.asm["hsaco"]
        registers, spilled, programs = _amd(assembly, warps)
    else:
        assembly, binary = kernel.asm["ptx"], kernel.asm["cubin"]
        registers, spilled = _nvidia(binary)
        programs = _nvidia_programs(registers, warps)
        shared_memory += KIB
    programs = min(programs, target.warps // warps, target.programs, target.all_shared_memory // max(shared_memory, 1))
    accesses = wide(kernel)
    found = Counter(plain or f"v_{amd}" for plain, amd in _TENSOR_CORE.findall(assembly))
    return Resources(
        registers=registers,
        spilled=spilled,
        shared_memory=kernel.metadata.shared,
        programs=programs,
        code=_code_bytes(binary),
        tensor_core=dict(found),
        dots=len(re.findall(r"\btt\.dot ", kernel.asm["ttir"])),
        scalar_dots=_scalar_dots(kernel.asm["ttgir"]),
        widest_store=accesses.widest_store,
        wide_loads=accesses.loads,
        wide_stores=accesses.stores,
    )


def _scalar_dots(ttgir: str) -> int:
    tensor_core_layouts = set(_MMA_LAYOUT.findall(ttgir))
    return sum(
        operand in ("f16", "bf16") and layout not in tensor_core_layouts for operand, layout in _DOT.findall(ttgir)
    )


def _nvidia(cubin: bytes) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file)
    registers = _number(r"REG:(\d+)", usage)
    # Triton's kernels keep nothing else on the stack; a cubin does not say how often it is read.
    return registers, _number(r"STACK:(\d+)", usage)


def _nvidia_programs(registers: int, warps: int) -> int:
    # A warp's registers come in units of 256, from its quarter of the multiprocessor's 65,536.
    of_warp = -(-32 * registers // 256) * 256
    return 4 * (16384 // of_warp) // warps


def _amd(assembly: str, warps: int) -> tuple[int, int, int]:
    registers = _number(r"; NumVgprs: (\d+)", assembly) + _number(r"; NumAgprs: (\d+)", assembly, default=0)
    # Waves a SIMD unit; a compute unit (RDNA: workgroup processor) has four.
    programs = 4 * _number(r"; Occupancy: (\d+)", assembly) // warps
    return registers, _number(r"; ScratchSize: (\d+)", assembly), programs


def _code_bytes(binary: bytes) -> int:
    """Of the executable sections of a 64-bit ELF file."""
    table, entry_size, entries = struct.unpack_from("<Q10xHH", binary, 0x28)
    total = 0
    for i in range(entries):
        kind, flags, size = struct.unpack_from("<4xIQ16xQ", binary, table + i * entry_size)
        total += size if kind == _PROGBITS and flags & _EXECUTABLE else 0
    return total


def _number(pattern: str, text: str, default: int | None = None) -> int:
    match = re.search(pattern, text)
    if match is None and default is None:
        raise ValueError(f"no {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(match[1]) if match else default


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
