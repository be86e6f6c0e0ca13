"""Basic blocks, loops, and the way that a program takes."""

from evidence.clocks.flow import Flow, Instruction, flow

# 0: either arm. 1-3: guard, loop, rest of one arm; 4-6 of the other. 7: the end.
ARMS = {0: [1, 4], 1: [2, 3], 2: [2, 3], 3: [7], 4: [5, 6], 5: [5, 6], 6: [7], 7: []}


def made(following: dict[int, list[int]]) -> Flow:
    return Flow([[Instruction(str(block), "")] for block in following], list(following.values()))


def test_loops_are_found_with_the_loop_around_them():
    nested = made({0: [1], 1: [2], 2: [2, 3], 3: [1, 4], 4: []})
    assert [(loop.header, loop.blocks, loop.parent) for loop in nested.loops] == [(1, {1, 2, 3}, None), (2, {2}, 0)]
    assert nested.own_blocks(0) == [1, 3]
    assert nested.depth(1) == 1


def test_a_block_runs_as_often_as_all_loops_around_it_turn():
    nested = made({0: [1], 1: [2], 2: [2, 3], 3: [1, 4], 4: []})
    assert nested.way({0: 5, 1: 3}, lambda block: 1) == {0: 1, 1: 5, 2: 15, 3: 5, 4: 1}


def test_a_program_enters_the_arm_whose_loop_turns_for_it():
    assert made(ARMS).way({0: 4, 1: 0}, lambda block: 1) == {0: 1, 1: 1, 2: 4, 3: 1, 7: 1}
    assert made(ARMS).way({0: 0, 1: 2}, lambda block: 100 if block == 3 else 1) == {0: 1, 4: 1, 5: 2, 6: 1, 7: 1}


def test_a_program_that_enters_no_loop_takes_the_shortest_way():
    assert made(ARMS).way({0: 0, 1: 0}, lambda block: 9 if block in (1, 3) else 1) == {0: 1, 4: 1, 6: 1, 7: 1}


def test_of_two_arms_without_loops_the_longer_is_taken():
    diamond = made({0: [1, 2], 1: [3], 2: [3], 3: []})
    assert diamond.way({}, lambda block: {1: 5, 2: 7}.get(block, 1)) == {0: 1, 2: 1, 3: 1}


def test_a_loop_that_is_left_at_its_top_is_gone_through():
    top_tested = made({0: [1], 1: [2, 3], 2: [1], 3: []})
    assert top_tested.way({0: 6}, lambda block: 1) == {0: 1, 1: 6, 2: 6, 3: 1}


def test_blocks_end_where_jumps_lead_and_behind_jumps():
    code = [
        Instruction("a", ""),
        Instruction("jump", "", target=3),
        Instruction("b", ""),
        Instruction("c", ""),
        Instruction("end", "", falls=False),
    ]
    found = flow(code)
    assert [[instruction.name for instruction in block] for block in found.blocks] == [
        ["a", "jump"],
        ["b"],
        ["c", "end"],
    ]
    assert found.following == [[2, 1], [2], []]
