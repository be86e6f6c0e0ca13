"""SASS, from text to instructions and their clocks."""

import pytest

from evidence.clocks.flow import Instruction, flow
from evidence.clocks.sass import cost, flops, instructions, is_shapeless_product

# A guard, a loop of two products, and an end behind which the assembler leaves a trap.
SASS = """\
Function:small_kernel
--:-:-:Y:2\tMOV R1, c[0x0][0x28];
--:-:-:Y:d\tISETP.GE.AND P0, PT, R1, 0x1, PT;
01:-:-:Y:5\t@!P0 BRA LBB1;
LBB0:
--:-:-:-:4\tLDG.E.128 R4, desc[UR4][R2.64];
--:-:-:Y:8\tHMMA.16816.F32.BF16 R8, R4, R12, R8;
--:-:-:Y:8\tHMMA.16816.F32.BF16 R8, R6, R12, R8;
--:-:-:Y:5\t@P0 BRA LBB0;
LBB1:
--:-:-:Y:1\tSTG.E.64 desc[UR4][R2.64], R8;
--:-:-:Y:5\tEXIT;
LBB2:
--:-:-:Y:0\tBRA LBB2;
--:-:-:Y:0\tNOP;
"""


def test_every_instruction_is_read_with_its_stall_and_where_it_leads():
    code = instructions(SASS)
    assert [instruction.name for instruction in code][:3] == ["MOV", "ISETP.GE.AND", "BRA"]
    assert code[1].stall == 13
    assert (code[2].target, code[2].falls) == (7, True)
    assert (code[6].target, code[6].falls) == (3, True)
    assert (code[8].target, code[8].falls) == (None, False)
    assert code[9].falls is False


def test_the_loop_is_found_and_the_trap_is_none():
    found = flow(instructions(SASS))
    assert len(found.loops) == 1
    (block,) = found.own_blocks(0)
    assert [instruction.name.split(".")[0] for instruction in found.blocks[block]] == ["LDG", "HMMA", "HMMA", "BRA"]


def test_a_jump_too_far_for_a_branch_closes_a_loop_as_well():
    far = SASS.replace("@P0 BRA LBB0;", "@P0 CALL.REL.NOINC 0x30;")
    assert [loop.blocks for loop in flow(instructions(far)).loops] == [{1}]


def test_a_branch_on_a_uniform_predicate_names_an_address():
    uniform = SASS.replace("@P0 BRA LBB0;", "BRA.U UP0, 0x30;")
    branch = instructions(uniform)[6]
    assert (branch.target, branch.falls) == (3, True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FFMA", {"issue": 1, "fp32": 1}),
        ("IMAD.WIDE", {"issue": 1, "fp32": 2}),
        ("LOP3.LUT", {"issue": 1, "alu": 2}),
        ("MUFU.EX2", {"issue": 1, "special": 8}),
        ("LDSM.16.M88.4", {"issue": 1, "shared": 4}),
        ("LDG.E.U16", {"issue": 1, "shared": 1, "global": 64}),
        ("STG.E.128", {"issue": 1, "shared": 4, "global": 512, "stored": 512}),
        ("NOP", {}),
    ],
)
def test_an_instruction_takes_its_clocks(name, expected):
    assert {key: value for key, value in cost(Instruction(name, name), 32).items() if value} == expected


def test_an_ampere_quarter_has_half_the_fp32_lanes():
    assert cost(Instruction("FFMA", "FFMA"), 16)["fp32"] == 2


def test_products_tell_their_shape():
    assert flops(Instruction("HMMA.16816.F32.BF16", ""), 8) == ("16 bits", 8 * 2 * 16 * 8 * 16)
    assert flops(Instruction("HMMA.1688.F32.TF32", ""), 1) == ("tf32", 2 * 16 * 8 * 8)
    # Four warps issue one together.
    assert flops(Instruction("HGMMA.64x256x16.F32.BF16", ""), 8) == ("16 bits", 2 * 2 * 64 * 256 * 16)
    assert flops(Instruction("FFMA", ""), 8)[1] == 0
    assert is_shapeless_product(Instruction("UTCHMMA.2CTA", ""))


def test_wgmma_reads_its_left_operand_from_shared_memory_unless_registers_hold_it():
    shared = Instruction("HGMMA.64x128x16.F32", "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24")
    registers = Instruction("HGMMA.64x128x16.F32", "HGMMA.64x128x16.F32 R24, R4, gdesc[UR4], R24")
    assert cost(shared, 32)["shared"] - cost(registers, 32)["shared"] == 64 * 16 * 2 / 128 / 4
