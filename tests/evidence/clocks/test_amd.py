"""AMD's assembly, from text to instructions and their clocks."""

import pytest

from evidence.clocks.amd import cost, flops, instructions
from evidence.clocks.flow import Instruction, flow

ASSEMBLY = """\
\t.text
small_kernel: ; @small_kernel
; %bb.0:
\t.loc\t1 33 0
\ts_load_dwordx2 s[2:3], s[0:1], 0x0
\ts_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\tv_mfma_f32_32x32x8_bf16 v[18:33], v[92:93], v[42:43], v[18:33]
\tds_read_b128 v[4:7], v1
\ts_cbranch_scc0 .LBB0_1
.LBB0_2:                                ; %._crit_edge
\tglobal_store_dwordx4 v0, v[18:21], s[2:3]
\ts_endpgm
.Lfunc_end0:
\t.amdhsa_next_free_vgpr 40
"""


def test_the_loop_and_its_products_are_found():
    found = flow(instructions(ASSEMBLY))
    assert [sorted(loop.blocks) for loop in found.loops] == [[1]]
    assert sum(flops(instruction, 4)[1] for instruction in found.blocks[1]) == 4 * 2 * 32 * 32 * 8
    assert sum(map(len, found.blocks)) == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v_fma_f32", {"issue": 1, "fp32": 4}),
        ("v_exp_f32_e32", {"issue": 1, "fp32": 16}),
        ("v_mfma_f32_16x16x16_bf16", {"issue": 1}),
        ("s_add_i32", {"issue": 1}),
        ("s_waitcnt", {}),
        ("ds_read_b128", {"issue": 1, "shared": 8}),
        ("ds_read2_b64", {"issue": 1, "shared": 8}),
        ("buffer_load_dwordx4", {"issue": 1, "global": 1024}),
        ("global_store_short", {"issue": 1, "global": 128, "stored": 128}),
    ],
)
def test_an_instruction_takes_its_clocks(name, expected):
    assert {key: value for key, value in cost(Instruction(name, name), 64).items() if value} == expected


def test_products_tell_their_shape_and_kind():
    assert flops(Instruction("v_wmma_f32_16x16x16_bf16", ""), 1) == ("16 bits", 2 * 16**3)
    assert flops(Instruction("v_mfma_f32_32x32x2_f32", ""), 1) == ("fp32", 2 * 32 * 32 * 2)
    assert flops(Instruction("v_mfma_f32_32x32x4_xf32", ""), 1) == ("tf32", 2 * 32 * 32 * 4)
