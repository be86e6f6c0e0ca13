"""What launches tell profilers agrees with the operators' FLOP formulas, and names every kernel."""

import pytest

from tests.support.compiled import printed_by

# A part of these is the stock operators'; and how many samples are kept no formula knows where nothing has run.
IN_PART = ("readout_attention", "keep_samples")


@pytest.fixture(scope="module")
def seen() -> list[dict]:
    return printed_by("-m", "tests.kernels.metadata_checks")


def test_the_flops_of_an_operators_launches_are_those_of_its_formula(seen):
    checked = [case for case in seen if not case["title"].startswith(IN_PART)]
    assert len(checked) > 15
    assert [case["title"] for case in checked if case["told"] != case["formula"]] == []


def test_every_launch_has_a_name_with_its_shape_and_counts_its_bytes(seen):
    launches = [each for case in seen for each in case["metadata"]]
    assert len({each["name"].split()[0] for each in launches}) > 18
    assert all(each["bytes"] > 0 for each in launches)
    assert "linear_kernel 72×64 bfloat16" in {each["name"] for each in launches}
    # x, γ, β, weight, bias and y of FC1, two bytes an element.
    fc1 = next(case for case in seen if case["title"].startswith("layer_norm_linear FC1"))
    assert fc1["metadata"][0]["bytes"] == 2 * (72 * 64 + 64 + 64 + 256 * 64 + 256 + 72 * 256)
    assert fc1["metadata"][0]["flops16"] == 2 * 72 * 64 * 256
