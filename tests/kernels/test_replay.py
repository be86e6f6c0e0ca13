"""A plan makes the launches that led to it: the same kernels, grids, arguments and results, at new addresses."""

import pytest

from tests.support.compiled import printed_by

# Their launchers run torch's operators too, so they go through them at every call.
NOT_REPLAYED = ("readout_attention", "distillation_loss", "keep_samples")


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.kernels.replay_checks")


def test_replayed_launches_and_results_are_those_of_the_launchers(seen):
    replayed = [case for case in seen["seen"] if not case["title"].startswith(NOT_REPLAYED)]
    assert len(replayed) > 45
    assert [case["title"] for case in replayed if not case["same"] or not case["launches"]] == []


def test_the_second_call_goes_past_the_launchers(seen):
    again = {case["title"] for case in seen["seen"] if case["anew"]}
    assert {title for title in again if not title.startswith(NOT_REPLAYED)} == set()


def test_what_launchers_decide_by_tells_calls_apart(seen):
    assert [name for name, right in seen["apart"].items() if not right] == []


def test_a_compiled_kernels_own_runner_takes_a_plans_arguments(seen):
    assert seen["runs"]


def test_plans_do_without_what_only_some_releases_of_torch_allocate_by(seen):
    assert seen["without"]
