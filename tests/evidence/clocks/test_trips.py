"""Loops of the code beside loops of the source."""

import numpy as np
import pytest

from evidence.clocks.source import Source, SourceLoop, Uncounted
from evidence.clocks.trips import less_peeled, programs
from tests.evidence.clocks.test_flow import ARMS, made


def loop(turns: list[float], flops: float) -> SourceLoop:
    return SourceLoop(0, np.array(turns, float), flops)


def source_of(*loops: SourceLoop) -> Source:
    return Source(list(loops), each=sum((loop.turns * loop.flops for loop in loops), np.zeros(1)))


def test_loops_that_the_compiler_moved_are_told_by_their_products():
    source = source_of(loop([3, 0], 100), loop([0, 5], 700))
    found = programs(made(ARMS), [700, 100], source)
    trips = sorted((group.trips[0], group.trips[1], group.count) for group in found)
    assert trips == [(0, 3, 1), (5, 0, 1)]


def test_an_unrolled_loop_turns_less_often():
    one = made({0: [1], 1: [1, 2], 2: []})
    (group,) = programs(one, [200], source_of(loop([8, 8], 100)))
    assert (group.count, group.trips) == (2, {0: 4})


def test_programs_that_enter_the_same_loops_are_counted_together():
    one = made({0: [1], 1: [1, 2], 2: []})
    found = programs(one, [100], source_of(loop([8, 8, 4, 0], 100)))
    assert sorted((group.count, group.trips[0]) for group in found) == [(1, 0), (3, 20 / 3)]


def test_a_loop_whose_products_do_not_tell_their_shape_is_one_of_products():
    one = made({0: [1], 1: [1, 2], 2: []})
    (group,) = programs(one, [None], source_of(loop([8], 100)))
    assert group.trips == {0: 8}
    with pytest.raises(Uncounted):
        programs(one, [None], source_of(loop([8], 0)))


def test_a_loop_that_was_unrolled_whole_is_missed_by_nobody():
    straight = made({0: [1], 1: []})
    (group,) = programs(straight, [], source_of(loop([2, 2, 0], 100)))
    assert (group.count, group.trips) == (3, {})


@pytest.mark.parametrize(
    ("flops", "loops", "reason"),
    [
        ([100], [loop([np.nan], 100)], "read from memory"),
        ([150], [loop([4], 100)], "1 loops in the machine code, 1 in the source"),
        ([0], [], "1 loops in the machine code, 0 in the source"),
    ],
)
def test_what_can_not_be_counted_is_said(flops, loops, reason):
    with pytest.raises(Uncounted, match=reason):
        programs(made({0: [1], 1: [1, 2], 2: []}), flops, source_of(*loops))


def test_a_turn_that_stands_behind_its_loop_is_not_counted_twice():
    one = made({0: [1], 1: [1, 2], 2: []})
    (group,) = programs(one, [100], source_of(loop([8], 100)))
    assert less_peeled(one, [100], group, 900) == {0: 7}
    assert less_peeled(one, [100], group, 850) == {0: 8}
