"""Clocks, peaks and multiprocessors of a GPU fit together."""

from math import log2

import pytest

from evidence.clocks.gpus import GPUS, H100


@pytest.mark.parametrize("gpu", [*GPUS.values(), H100], ids=lambda gpu: gpu.name)
def test_peak_clock_and_multiprocessors_make_a_power_of_two_a_clock(gpu):
    flops = gpu.flops("16 bits")
    assert flops == pytest.approx(2 ** round(log2(flops)), rel=0.01)


def test_a_kind_that_the_hardware_has_not_is_refused():
    with pytest.raises(ValueError, match="no matrix products of tf32"):
        GPUS["gfx90a"].flops("tf32")
