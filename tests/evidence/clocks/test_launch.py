"""From clocks to a floor and to a modelled time."""

import itertools

import pytest

from evidence.clocks.gpus import GPUS, H200
from evidence.clocks.launch import Count, floor, modelled
from evidence.clocks.program import Program

PROGRAM = Program(issue=1000, fp32=400, special=100, shared=500, tensor=800, flops=1e6, alone=5000)


def counted(program: Program, number: int, dram: int = 0) -> Count:
    return Count({program: number}, resident=2, dram=dram, looped=True)


def test_the_floor_is_the_busiest_resource_spread_over_all_multiprocessors():
    microseconds, bound = floor(counted(PROGRAM, 10 * H200.multiprocessors), H200)
    assert (microseconds, bound) == (pytest.approx(10 * 1000 / 1830), "issue")


def test_bytes_bound_the_floor_at_the_data_sheets_bandwidth():
    assert floor(counted(PROGRAM, 1, dram=4_800_000_000), H200) == (pytest.approx(1000), "memory")


def test_shared_memory_is_no_part_of_a_floor():
    assert floor(counted(Program(issue=10, shared=1e6), 132), H200)[1] == "issue"


def test_more_programs_never_have_a_lower_floor():
    floors = [floor(counted(PROGRAM, number, dram=1000 * number), H200)[0] for number in (1, 10, 132, 133, 1000)]
    assert floors == sorted(floors)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
def test_a_modelled_time_is_never_below_the_floor(target):
    kinds = (1, 1e3, 1e6)
    for issue, tensor, alone, number, dram in itertools.product(kinds, kinds, kinds, (1, 131, 5000), (0, 10**9)):
        program = Program(issue=issue, tensor=tensor, alone=alone, chained=True)
        count = counted(program, number, dram)
        assert modelled(count, GPUS[target]).microseconds > floor(count, GPUS[target])[0]


def test_few_programs_are_modelled_in_whole_waves():
    one_wave, two_waves = (modelled(counted(PROGRAM, number), H200).microseconds for number in (264, 265))
    assert two_waves > 1.4 * one_wave
    assert modelled(counted(PROGRAM, 133), H200).microseconds == one_wave


def test_no_time_is_modelled_for_a_gpu_without_assumptions():
    assert modelled(counted(PROGRAM, 1), GPUS["gfx942"]) is None


def test_programs_of_several_kinds_are_averaged():
    mixed = Count({Program(issue=100): 3, Program(issue=20): 1}, resident=1, dram=0, looped=True)
    assert mixed.number == 4
    assert mixed.average.issue == 80
