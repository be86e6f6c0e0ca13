"""NVIDIA's machine code (SASS), as Triton disassembles it: instructions, and what each takes of a multiprocessor.

Throughputs are those of the CUDA C++ programming guide, 'arithmetic instructions'; a warp instruction takes one clock
of its quarter's issue slot.
"""

import re

from evidence.clocks.flow import Instruction

# `04:-:-:Y:2	@!P0 BRA LBB3;`: what it waits for, and how many clocks pass after it.
_LINE = re.compile(r"\s*[\d-]+:[\d-]:[\d-]:[Y-]:([\da-f])\t(?:(@\S+)\s+)?([A-Z][\w.]*)(.*)")
_LABEL = re.compile(r"(LBB\d+):")
_CONDITION = re.compile(r"^\s*!?U?P\d")
_IDLE = re.compile(r"BRA\b|NOP$|NANOSLEEP|SYNCS\.PHASECHK")
_FAR = re.compile(r"0x([\da-f]+)")
_BYTES = 16  # of an instruction

FP32 = frozenset(["FFMA", "FMUL", "FADD", "FFMA2", "FMUL2", "FADD2"])
_MULTIPLIER = frozenset(["IMAD", "HFMA2", "HADD2", "HMUL2"])
_ALU = frozenset(
    [
        "BMSK", "F2FP", "FCHK", "FLO", "FMNMX", "FSEL", "FSETP", "IABS", "ICMP", "IADD3", "IMNMX", "ISETP", "LEA",
        "LEPC", "LOP", "LOP3", "MOV", "P2R", "PLOP3", "POPC", "PRMT", "R2P", "SEL", "SGXT", "SHF", "VIADD",
        "VIADDMNMX", "VIMNMX", "VIMNMX3",
    ]
)  # fmt: skip
_SPECIAL = frozenset(["F2F", "F2I", "FRND", "I2F", "I2FP", "I2I", "MUFU"])
_SHARED = frozenset(["LDGSTS", "LDG", "LDL", "LDS", "STG", "STL", "STS", "STSM"])
_GLOBAL = frozenset(["LDG", "LDGSTS", "STG"])
_WGMMA = re.compile(r"HGMMA\.64x(\d+)x(\d+)")
_MMA = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}


def instructions(sass: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[re.Match[str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(lines)
        elif found := _LINE.match(line):
            lines.append(found)
    return [_instruction(found[1], found[2], found[3], found[4], labels, len(lines)) for found in lines]


def _instruction(
    stall: str, predicate: str | None, name: str, rest: str, labels: dict[str, int], length: int
) -> Instruction:
    kind = name.split(".")[0]
    target, falls = None, True
    if kind == "BRA":
        if label := re.search(r"LBB\d+", rest):
            target = labels[label[0]]
        elif address := _FAR.search(rest):  # `BRA.U UP0, 0x1a0`, which Triton gives no label
            target = min(int(address[1], 16) // _BYTES, length)
        falls = predicate is not None or bool(_CONDITION.match(rest))
    elif name.startswith("CALL.REL.NOINC") and (far := _FAR.search(rest)):  # a jump that is too far for BRA
        target = min(int(far[1], 16) // _BYTES, length)
        falls = predicate is not None
    elif kind in ("EXIT", "RET"):
        falls = predicate is not None
    return Instruction(name, f"{name}{rest}", max(1, int(stall, 16)), target, falls, bool(_IDLE.match(name)))


def cost(instruction: Instruction, fp32_lanes: int) -> dict[str, float]:
    """Clocks of a quarter of a multiprocessor for one warp: issue, fp32, alu, special.

    shared: clocks of the whole multiprocessor's shared memory. global, stored: bytes to and from global memory.
    fp32_lanes: of a quarter.
    """
    name = instruction.name
    kind = name.split(".")[0]
    if kind == "NOP":
        return {}
    found: dict[str, float] = {"issue": 1}
    if kind in FP32:
        found["fp32"] = 32 // fp32_lanes
    elif kind in _MULTIPLIER:
        found["fp32"] = 2
    elif kind in _ALU:
        found["alu"] = 2
    elif kind in _SPECIAL:
        found["special"] = 8
    elif kind == "SHFL":
        found["shared"] = 1
    elif kind == "LDSM" or (kind == "STSM" and name.endswith(".4")):
        found["shared"] = int(name[-1]) if name[-1] in "24" else 1
    elif kind in _SHARED:
        found["shared"] = _words(name)
    elif wgmma := _WGMMA.match(name):
        # Both operands, or the right one alone, for the four warps of a group.
        left_in_registers = re.match(r"HGMMA\S*\s+R\d+,\s*R\d+", instruction.text)
        found["shared"] = (int(wgmma[1]) * int(wgmma[2]) * 2 / 128 + (0 if left_in_registers else 16)) / 4
    if kind in _GLOBAL:
        found["global"] = {"U8": 32, "S8": 32, "U16": 64}.get(_width(name), 128 * _words(name))
        found["stored"] = found["global"] if kind == "STG" else 0
    return found


def flops(instruction: Instruction, warps: int) -> tuple[str, int]:
    """Of the whole program, two a multiply-add; first their operands' kind, `tf32` or `16 bits`."""
    kind = "tf32" if "TF32" in instruction.name else "16 bits"
    if wgmma := _WGMMA.match(instruction.name):
        return kind, 2 * 64 * int(wgmma[1]) * int(wgmma[2]) * (warps // 4)
    if instruction.name.startswith("HMMA."):
        return kind, 2 * _MMA.get(instruction.name.split(".")[1], 0) * warps
    return kind, 0


def is_shapeless_product(instruction: Instruction) -> bool:
    """Whether it is a product whose shape the instruction does not tell, tcgen05's."""
    return bool(re.match(r"UTC\w*MMA", instruction.name))


def _words(name: str) -> int:
    return 4 if ".128" in name else 2 if ".64" in name else 1


def _width(name: str) -> str:
    return next((part for part in name.split(".") if part in ("U8", "S8", "U16")), "")
