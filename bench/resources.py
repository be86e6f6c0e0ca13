"""What a compiled kernel takes of a GPU: registers, spills, shared memory, tensor-core instructions."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

_TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)|\bv_(mfma|smfmac|wmma|swmmac)_", re.MULTILINE)
# Global stores: `st.global.v4.b32`; `global_store_dwordx4`, `buffer_store_b128`, `global_store_short`.
_NVIDIA_STORE = re.compile(r"\bst\.global(?:\.L\d::\w+|\.[a-z]{2})*(?:\.v(\d))?\.b(\d+)")
_AMD_STORE = re.compile(r"\b(?:global|buffer)_store_(byte|short|b8|b16|dword(?:x\d)?|b\d+)")
_AMD_WORDS = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
# `#mma = #ttg.nvidia_mma<…>`: a layout that a tensor-core instruction produces.
_MMA_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma|amd_wmma)<", re.MULTILINE)
# `tt.dot %a, %b, %c … : tensor<64x32xbf16, …> * … -> tensor<64x64xf32, #blocked>`: still a plain dot.
_DOT = re.compile(r"\btt\.dot .*? : tensor<[\dx]+x(\w+), .*-> tensor<[^#]*(#\w+)>")


@dataclass(frozen=True)
class Resources:
    """Of one program. registers: a thread. spilled, shared_memory: bytes (spilled: a thread).

    tensor_core: instruction kinds and how often each stands in the assembly.
    dots: `tl.dot`s in the kernel, before loops are unrolled; scalar_dots: those of 16-bit operands that
    became multiply-adds without tensor cores. widest_store: bytes a thread stores at once.
    """

    registers: int
    spilled: int
    shared_memory: int
    tensor_core: dict[str, int]
    dots: int
    scalar_dots: int
    widest_store: int


def resources(kernel: CompiledKernel) -> Resources:
    """Reads them from what `kernel` was compiled to, with the tools that Triton carries."""
    if "cubin" in kernel.asm:
        assembly = kernel.asm["ptx"]
        registers, spilled = _nvidia(kernel)
        stores = [int(vector or 1) * int(bits) // 8 for vector, bits in _NVIDIA_STORE.findall(assembly)]
    else:
        assembly = kernel.asm["amdgcn"]
        registers, spilled = _amd(assembly)
        stores = [_AMD_WORDS.get(kind) or int(kind[1:]) // 8 for kind in _AMD_STORE.findall(assembly)]
    found = Counter(plain or f"v_{amd}" for plain, amd in _TENSOR_CORE.findall(assembly))
    return Resources(
        registers=registers,
        spilled=spilled,
        shared_memory=kernel.metadata.shared,
        tensor_core=dict(found),
        dots=len(re.findall(r"\btt\.dot ", kernel.asm["ttir"])),
        scalar_dots=_scalar_dots(kernel.asm["ttgir"]),
        widest_store=max(stores, default=0),
    )


def _scalar_dots(ttgir: str) -> int:
    tensor_core_layouts = set(_MMA_LAYOUT.findall(ttgir))
    return sum(
        operand in ("f16", "bf16") and layout not in tensor_core_layouts for operand, layout in _DOT.findall(ttgir)
    )


def _nvidia(kernel: CompiledKernel) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
    registers = _number(r"REG:(\d+)", usage)
    # Triton's kernels keep nothing else on the stack; a cubin does not say how often it is read.
    return registers, _number(r"STACK:(\d+)", usage)


def _amd(assembly: str) -> tuple[int, int]:
    registers = _number(r"; NumVgprs: (\d+)", assembly) + _number(r"; NumAgprs: (\d+)", assembly, default=0)
    return registers, _number(r"; ScratchSize: (\d+)", assembly)


def _number(pattern: str, text: str, default: int | None = None) -> int:
    match = re.search(pattern, text)
    if match is None and default is None:
        raise ValueError(f"no {pattern!r} in the compiler's output:\n{text[:2000]}")
    return int(match[1]) if match else default


def _output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
