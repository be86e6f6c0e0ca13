"""Triton's intermediate representation, run for the scalars of a launch."""

import numpy as np
import pytest

from evidence.clocks.source import Uncounted, source

HEAD = """\
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @kernel(%x_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32} loc("x_ptr"(#loc)), \
%kept_ptr: !tt.ptr<i32> loc("kept_ptr"(#loc)), %length: i32 loc("length"(#loc))) attributes {noinline = false} {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c3 = arith.constant 3 : i32 loc(#loc1)
    %c64 = arith.constant 64 : i32 loc(#loc1)
    %cst = arith.constant dense<0.0> : tensor<32x64xf32, #mma> loc(#loc1)
    %program = tt.get_program_id x : i32 loc(#loc1)
"""
LOOP = """\
    %total = scf.for %i = %c0 to %length step %c64 iter_args(%sum = %cst) -> (tensor<32x64xf32, #mma>)  : i32 {
      %next = tt.dot %a, %b, %sum : tensor<32x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * \
tensor<64x64xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 2}>> -> tensor<32x64xf32, #mma> loc(#loc2)
      scf.yield %next : tensor<32x64xf32, #mma> loc(#loc2)
    } loc(#loc2)
"""
TAIL = """\
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""


def run(body: str, length: float = 200, programs: int = 6):
    shapes = {"x_ptr": (10, 64), "kept_ptr": (5,)}
    return source(HEAD + body + TAIL, (programs, 1, 1), {"length": length}, shapes)


def test_a_loop_turns_as_often_as_its_bounds_say():
    (loop,) = run(LOOP).loops
    assert loop.turns.tolist() == [4] * 6
    assert loop.depth == 0


def test_rows_that_several_warps_compute_alike_are_computed_several_times():
    (loop,) = run(LOOP).loops
    assert loop.flops == 2 * 64 * 64 * 64  # four warps of 16 rows, for a tile of 32


def test_a_branch_on_the_program_gives_each_its_own_turns():
    body = f"""\
    %which = arith.remsi %program, %c3 : i32 loc(#loc1)
    %first = arith.cmpi eq, %which, %c0 : i32 loc(#loc1)
    scf.if %first {{
{LOOP}    }} else {{
    }} loc(#loc1)
"""
    found = run(body)
    assert found.loops[0].turns.tolist() == [4, 0, 0, 4, 0, 0]
    assert (found.each / found.loops[0].flops).tolist() == [4, 0, 0, 4, 0, 0]


def test_a_branch_hands_on_what_each_program_took():
    body = """\
    %first = arith.cmpi slt, %program, %c3 : i32 loc(#loc1)
    %bound = scf.if %first -> (i32) {
      scf.yield %c64 : i32 loc(#loc1)
    } else {
      scf.yield %length : i32 loc(#loc1)
    } loc(#loc1)
""" + LOOP.replace("to %length", "to %bound")
    assert run(body).loops[0].turns.tolist() == [1, 1, 1, 4, 4, 4]


def test_programs_that_return_early_turn_no_loop():
    body = f"""\
    %late = arith.cmpi sge, %program, %c3 : i32 loc(#loc1)
    cf.cond_br %late, ^bb1, ^bb2 loc(#loc1)
  ^bb1:  // pred: ^bb0
    tt.return loc(#loc)
  ^bb2:  // pred: ^bb0
{LOOP}"""
    assert run(body).loops[0].turns.tolist() == [4, 4, 4, 0, 0, 0]


def test_what_memory_holds_is_taken_to_be_the_highest_index():
    body = (
        "    %kept = tt.load %kept_ptr : !tt.ptr<i32> loc(#loc1)\n    %many = arith.muli %kept, %c64 : i32 loc(#loc1)\n"
    )
    assert run(body + LOOP.replace("to %length", "to %many")).loops[0].turns.tolist() == [4] * 6


def test_a_bound_that_nothing_tells_is_not_guessed():
    assert np.isnan(run(LOOP.replace("to %length", "to %unknown")).loops[0].turns).all()


def test_regions_of_reductions_are_passed_over():
    body = """\
    %sum = "tt.reduce"(%cst) <{axis = 0 : i32}> ({
    ^bb0(%a: f32 loc(#loc1), %b: f32 loc(#loc1)):
      %c = arith.addf %a, %b : f32 loc(#loc1)
      tt.reduce.return %c : f32 loc(#loc1)
    }) : (tensor<32x64xf32, #mma>) -> tensor<64xf32, #ttg.slice<{dim = 0, parent = #mma}>> loc(#loc1)
"""
    assert len(run(body + LOOP).loops) == 1


def test_control_flow_of_another_kind_is_said_not_to_be_counted():
    with pytest.raises(Uncounted, match=r"scf\.while"):
        run("    %r = scf.while (%a = %c0) : (i32) -> i32 {\n    } loc(#loc1)\n")
