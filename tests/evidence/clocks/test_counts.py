"""A compiled product, whose counts are known."""

import pytest

from tests.support.compiled import printed_by

FLOPS = 2 * 1024 * 256 * 512


@pytest.fixture(scope="module")
def found():
    return printed_by("-m", "tests.evidence.clocks.clocks_checks")


@pytest.mark.parametrize("gpu", ["plain", "a100", "b200", "mi300x"])
def test_the_products_in_the_code_are_those_of_the_launch(found, gpu):
    assert found[gpu]["flops"] == FLOPS


def test_tensor_clocks_are_the_flops_at_the_peak(found):
    assert found["plain"]["clocks"]["tensor"] == pytest.approx(FLOPS / 16 / 4096, rel=0.01)


def test_a_ragged_tile_is_computed_whole(found):
    assert found["ragged"]["flops"] == FLOPS


def test_memory_is_every_tensor_once(found):
    assert found["plain"]["dram"] == 2 * (1024 * 512 + 256 * 512 + 1024 * 256)


def test_arithmetic_in_the_epilogue_adds_instructions_and_no_product(found):
    plain, gelu = found["plain"], found["gelu"]
    assert gelu["flops"] == plain["flops"]
    # At least two multiplications, an exponential and a division an element; a quarter has 32 lanes.
    assert gelu["clocks"]["issue"] - plain["clocks"]["issue"] >= 4 * 128 * 128 / 128
    assert gelu["clocks"]["special"] - plain["clocks"]["special"] >= 8 * 128 * 128 / 128


def test_programs_without_work_are_counted_apart(found):
    assert found["plain"]["kinds"] == [16]
    assert found["idle"]["kinds"] == [5, 16]
    assert found["idle"]["flops"] == FLOPS
    assert found["idle"]["clocks"]["issue"] < 0.85 * found["plain"]["clocks"]["issue"]


def test_more_rows_never_have_a_lower_floor(found):
    assert found["rows"] == sorted(found["rows"])


@pytest.mark.parametrize("gpu", ["plain", "gelu", "a100"])
def test_no_modelled_time_is_below_the_floor(found, gpu):
    assert found[gpu]["modelled"] > found[gpu]["floor"]
