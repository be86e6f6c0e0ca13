"""AMD's machine code, as LLVM writes it: instructions, and what each takes of a compute unit.

Rates are those of AMD's instruction set manuals: a SIMD unit (one of four) of CDNA has 16 lanes, so a wave of 64
holds its vector unit four clocks; transcendental functions and 32-bit integer products take four times as long.
"""

import re

from evidence.clocks.flow import Instruction

_LABEL = re.compile(r"(\.LBB\d+_\d+):")
_LINE = re.compile(r"\t([a-z]\w+)(?:\s+([^;\n]*))?")
_SLOW = re.compile(r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos|mul_lo|mul_hi|mad_u64|mad_i64)")
_MATRIX = re.compile(r"v_(?:mfma|smfmac|wmma|swmmac)_\w+?_(\d+)x(\d+)x(\d+)_?(\w*)")
_LANES = 16
_ACCESS = re.compile(r"(?:global|buffer)_(load|store)_(?:lds_)?(?:d16_)?(?:hi_)?[us]?(byte|short|dwordx\d|dword|b\d+)")
_ACCESS_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
_LDS = re.compile(r"ds_(?:read|write|load|store)(2)?\w*?_[bu](\d+)")
_LDS_BYTES = 128  # a clock of a compute unit


def instructions(assembly: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in assembly.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append(found)
    return [_instruction(found[1], found[2] or "", labels) for found in lines]


def _instruction(name: str, rest: str, labels: dict[str, int]) -> Instruction:
    target = labels.get(rest.strip()) if name.startswith(("s_branch", "s_cbranch")) else None
    return Instruction(name, f"{name} {rest}".strip(), 1, target, name not in ("s_branch", "s_endpgm"))


def cost(instruction: Instruction, wave: int) -> dict[str, float]:
    """Clocks of a SIMD unit for one wave of `wave` threads: issue, fp32 (all vector instructions).

    shared: clocks of the whole compute unit's LDS. global, stored: bytes to and from global memory.
    """
    name = instruction.name
    if name == "s_nop" or name.startswith("s_wait"):
        return {}
    found: dict[str, float] = {"issue": 1}
    if name.startswith("v_") and not _MATRIX.match(name):
        found["fp32"] = (wave // _LANES if wave == 64 else 1) * (4 if _SLOW.match(name) else 1)
    if lds := _LDS.match(name):
        found["shared"] = wave * int(lds[2]) // 8 * (2 if lds[1] else 1) / _LDS_BYTES
    elif name.startswith("ds_"):
        found["shared"] = wave * 4 / _LDS_BYTES
    if access := _ACCESS.match(name):
        found["global"] = wave * (_ACCESS_BYTES.get(access[2]) or int(access[2][1:]) // 8)
        found["stored"] = found["global"] if access[1] == "store" else 0
    return found


def flops(instruction: Instruction, waves: int) -> tuple[str, int]:
    """Of the whole program, two a multiply-add; first their operands' kind, `tf32`, `fp32` or `16 bits`."""
    matrix = _MATRIX.match(instruction.name)
    if matrix is None:
        return "16 bits", 0
    m, n, k = (int(matrix[i]) for i in (1, 2, 3))
    kind = {"f32": "fp32", "xf32": "tf32"}.get(matrix[4].split("_")[0], "16 bits")
    return kind, 2 * m * n * k * waves
