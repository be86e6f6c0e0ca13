"""A plan makes the launches that led to it: the same kernels, grids, arguments and results, at new addresses."""

import pytest

from tests.support.compiled import printed_by

# Their launchers run torch's operators too, so they go through them at every call.
NOT_REPLAYED = ("readout_attention", "distillation_loss", "keep_samples")


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.kernels.launching.replay_checks")


def test_replayed_launches_and_results_are_those_of_the_launchers(seen):
    replayed = [case for case in seen["seen"] if not case["title"].startswith(NOT_REPLAYED)]
    assert len(replayed) > 45
    assert [case["title"] for case in replayed if not case["same"] or not case["launches"]] == []


def test_the_second_call_goes_past_the_launchers(seen):
    again = {case["title"] for case in seen["seen"] if case["anew"]}
    assert {title for title in again if not title.startswith(NOT_REPLAYED)} == set()


def test_either_half_of_a_block_is_one_chain_for_inference_and_two_for_training(seen):
    chains = {case["title"]: case["chains"] for case in seen["seen"] if case["title"].startswith("chained")}
    assert len(chains) == 17
    few = {"mlp.fc2.bias": 1, "norm2.weight, mlp.fc1.weight": 3, "attn.proj.weight": 2, "norm1.bias": 4}
    expected = {f"chained block, {names} trained": count for names, count in few.items()}
    expected["chained, separate q, k, v"] = 2
    assert {title: chains[title] for title in expected} == expected
    whole = {title: count for title, count in chains.items() if title not in expected}
    assert whole == {title: 4 if "training" in title else 2 for title in whole}
    watched = [case["chains"] for case in seen["seen"] if case["title"] not in chains]
    assert set(watched) == {0}, "a dispatch mode sees each operator"


def test_what_launchers_decide_by_tells_calls_apart(seen):
    assert [name for name, right in seen["apart"].items() if not right] == []


def test_a_compiled_kernels_own_runner_takes_a_plans_arguments(seen):
    assert seen["runs"]


def test_plans_do_without_what_only_some_releases_of_torch_allocate_by(seen):
    assert seen["without"]


def test_a_plan_that_does_not_run_is_tried_once_a_shape_and_after_three_shapes_not_at_all(seen):
    refused = seen["refused"]
    first, second, third, fourth = (refused["plans run"][i : i + 3] for i in range(0, 12, 3))
    assert first == second == third == [0, 1, 0]
    assert fourth == [0, 0, 0]
    assert refused["anew"] == [1] * 12, "every call is answered by the kernel"


def test_that_plans_are_given_up_is_said_once(seen):
    (message,) = seen["refused"]["said"]
    assert message.startswith("deit_fast.linear: its launches could not be repeated for 3 shapes")
    assert "an integer is no pointer" in message


def test_with_a_release_of_triton_that_was_not_read_triton_launches_and_it_is_said_once(seen):
    assert seen["unknown"]["anew"] == [1, 1, 1]
    (message,) = seen["unknown"]["said"]
    assert "Triton launches each kernel itself" in message
