"""How wide a compiled kernel's accesses of global memory are: the share of its bytes in accesses of 128 bits."""

import re
from collections import defaultdict
from math import prod
from typing import NamedTuple

from triton.compiler import CompiledKernel

_WIDE = 16

# `#loc7 = loc("x"(#loc3))`, `loc(callsite(#loc3 at #loc5))` and `loc("…/linear.py":98:21)`: the callee comes first.
_LOCATION = re.compile(r'^(#loc\d*) = loc\((?:callsite\((#loc\d*) |"[^"]*"\((#loc\d*)\)|"([^"]*)":(\d+):(\d+))', re.M)
# `tt.load %p, …`, `tt.store`, `ttg.async_copy_global_to_local`, `amdg.buffer_load`, and the type of what they access:
# `tensor<128x64x!tt.ptr<bf16>, …>`, `!tt.ptr<i32>`, `tensor<128x64xbf16, …>`.
_OPERATION = re.compile(
    r"\b(?:tt\.(load|store)|ttg\.(async_copy)_global_to_local|amdg\.buffer_(load|store)) [^:\n]*?(?:\{[^}\n]*\} )?"
    r": (?:tensor<((?:\d+x)+)|)(?:!tt\.ptr<)?([a-z]+)(\d+)[^\n]* loc\((#loc\d*)\)$",
    re.M,
)
# `amdg.buffer_load_to_local %p[%o] … : <bf16>[tensor<…>] … -> <128x64xbf16, #shared, …>`: what it fills has the type.
_TO_LOCAL = re.compile(r"\bamdg\.buffer_load_to_local [^\n]* -> <((?:\d+x)+)[a-z]+(\d+),[^\n]* loc\((#loc\d*)\)$", re.M)

_FILE = re.compile(r'^\s*\.file\s+(\d+) .*?([^"/]+)"\s*$')
_PLACE = re.compile(r"^\s*\.loc\s+(\d+) (\d+) (\d+)")
# `ld.global.L1::evict_first.v4.b32`, `st.global.v2.b16`, `cp.async.cg.shared.global [ … ], [ … ], 0x10`.
_NVIDIA_ACCESS = re.compile(r"\b(ld|st)\.global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b")
_NVIDIA_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global [^,]+, [^,]+, (0x[0-9a-f]+|\d+)")
# `global_load_dwordx4`, `buffer_store_b128`, `global_store_short`, `global_load_ushort`, `global_load_lds_dwordx4`.
_AMD_ACCESS = re.compile(
    r"\b(?:global|buffer)_(load|store)_(?:lds_)?(?:d16_)?(?:hi_)?[us]?(byte|short|dwordx\d|dword|[biu]\d+)"
)
_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


class Place(NamedTuple):
    """In a kernel's source, which both the intermediate representation and the assembly name."""

    file: str
    line: int
    column: int


class Wide(NamedTuple):
    """Shares of bytes; None where nothing is accessed. widest_store: bytes a thread."""

    loads: float | None
    stores: float | None
    widest_store: int


def wide(kernel: CompiledKernel) -> Wide:
    """What of a program's loads and stores is 128 bits wide, by the bytes of the tiles that it accesses.

    An access of the source weighs what its tile holds, once however many threads load the same element, and once
    whether in a loop or not; how wide it is tells the assembly, by the place in the source that it names.
    """
    assembly = kernel.asm["amdgcn" if "amdgcn" in kernel.asm else "ptx"]
    widths = _widths(assembly)
    moved: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for kind, place, size in _operations(kernel.asm["ttgir"]):
        found = widths.get((kind, place))
        if found:  # else the compiler found the access to be of no use
            moved[kind][0] += size * sum(width for width in found if width >= _WIDE) / sum(found)
            moved[kind][1] += size
    loads, stores = (moved[kind][0] / moved[kind][1] if kind in moved else None for kind in ("load", "store"))
    widest_store = max((max(found) for (kind, _), found in widths.items() if kind == "store"), default=0)
    return Wide(loads, stores, widest_store)


def _operations(ttgir: str) -> list[tuple[str, Place | None, int]]:
    """`load` or `store`, where, and how many bytes, of every access in the source."""
    named: dict[str, str | Place] = {}
    for alias, callee, inner, file, line, column in _LOCATION.findall(ttgir):
        named[alias] = callee or inner or Place(file.rpartition("/")[2], int(line), int(column))

    def place(alias: str) -> Place | None:
        found = named.get(alias)
        return place(found) if isinstance(found, str) else found

    found = [
        ("store" if "store" in (plain, amd) else "load", shape, bits, alias)
        for plain, _, amd, shape, _, bits, alias in _OPERATION.findall(ttgir)
    ]
    found += [("load", *access) for access in _TO_LOCAL.findall(ttgir)]
    return [
        (kind, place(alias), prod(int(length) for length in shape.split("x") if length) * int(bits) // 8)
        for kind, shape, bits, alias in found
    ]


def _widths(assembly: str) -> dict[tuple[str, Place], list[int]]:
    """Bytes a thread of each instruction that loads from or stores to global memory, by where in the source."""
    files = {number: name for line in assembly.splitlines() for number, name in _FILE.findall(line)}
    found: dict[tuple[str, Place], list[int]] = defaultdict(list)
    place, inline = None, False
    for line in assembly.splitlines():
        if line.lstrip() in ("// begin inline asm", "// end inline asm"):
            inline = "begin" in line
        # Within inline assembly every instruction is said to stand a line further down.
        elif not inline and (at := _PLACE.match(line)):
            place = Place(files.get(at[1], ""), int(at[2]), int(at[3]))
        for kind, width in _accesses(line):
            found[kind, place].append(width)
    return found


def _accesses(line: str) -> list[tuple[str, int]]:
    nvidia = [
        ("load" if kind == "ld" else "store", int(vector or 1) * int(bits) // 8)
        for kind, vector, bits in _NVIDIA_ACCESS.findall(line)
    ]
    copies = [("load", int(size, 0)) for size in _NVIDIA_COPY.findall(line)]
    amd = [(kind, _AMD_BYTES.get(width) or int(width[1:]) // 8) for kind, width in _AMD_ACCESS.findall(line)]
    return nvidia + copies + amd
