import copy

import pytest
import torch

from deit_fast.benchmark.candidates import in_turn, kernels_chosen, neighbours, tunable
from deit_fast.benchmark.operator_cases import OperatorCase
from deit_fast.benchmark.tune import _agree, tune
from deit_fast.kernels.attention.settings import AttentionTile
from deit_fast.kernels.launching.settings import Tile
from deit_fast.ops.operator import OPERATORS
from tests.support.compiled import printed_by


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.benchmark.tune_checks")


def test_the_fastest_settings_are_found_and_kept(seen):
    for name in ("layer_norm_linear", "linear_residual", "patch_embed"):
        for found in seen["found"][name]:
            (tile,) = found["settings"].values()
            assert (tile["rows"], tile["depth"]) == (64, 32)
            assert found["seconds"] == {"stock": 2.0, "shipped": found["seconds"]["shipped"], "tuned": 1.0}


def test_an_operator_with_several_settings_has_each_tuned(seen):
    for found in seen["found"]["linear_backward"]:
        assert {asked.partition("(")[0] for asked in found["settings"]} == {"input_gradient", "weight_gradient"}


def test_where_the_stock_operators_are_fastest_they_are_chosen(seen):
    (found,) = seen["found"]["attention"]
    assert found["stock"] and found["settings"] == {}


def test_what_gains_nothing_stays_as_shipped(seen):
    (found,) = seen["found"]["layer_norm"]
    assert found["settings"] == {} and not found["stock"] and found["seconds"]["tuned"] == found["seconds"]["shipped"]


def test_a_step_then_launches_what_was_chosen_and_as_shipped_while_that_is_off(seen):
    assert ["linear_kernel", 32, 64] in seen["untuned"] and ["attention_kernel", None, None] in seen["untuned"]
    assert next(kernel for kernel in seen["heeded"] if kernel[0] == "linear_kernel") == ["linear_kernel", 64, 32]
    assert "attention_kernel" not in {kernel for kernel, *_ in seen["heeded"]}


def test_a_setting_that_does_not_run_gives_way_to_the_shipped_one_and_says_so_once(seen):
    (said,) = seen["broken"]["said"]
    assert "linear does not run with what was measured for it (ValueError: a setting has rows; the table has" in said
    assert seen["broken"]["launches"] == ["linear_kernel"] * 2


def test_the_vendors_gemm_is_tried_and_where_it_is_fastest_heeded(seen):
    assert {with_kept for _, with_kept, _ in seen["vendor"]["choices"]} == {False, True}
    for failure, _, settings in seen["vendor"]["choices"]:
        assert failure is None
        # By it alone, without a tile that it has no use for.
        assert {asked.partition("(")[0]: setting for asked, setting in settings.items()} == {"vendor": True}
    assert "epilogue_kernel" in {kernel for kernel, *_ in seen["vendor"]["launches"]}


def test_other_kernels_than_the_shipped_one_are_tried_with_settings_of_their_own(seen):
    assert {asked.partition("(")[0] for asked in seen["narrow"]["linear_kernel"]} <= {"gemm"}
    assert seen["narrow"]["epilogue_kernel"] == {"vendor(linear, activated, 16384, 576, 192, 2, sm_90, 1, False)": True}


def test_our_kernel_is_tried_where_the_vendors_gemm_is_shipped_and_heeded_where_it_is_faster(seen):
    ours, theirs = seen["wide"]["linear_kernel"], seen["wide"]["epilogue_kernel"]
    asked = "vendor(linear, residual, 16384, 768, 3072, 2, sm_90, 1, False)"
    assert ours[asked] is False and {each.partition("(")[0] for each in ours} <= {"vendor", "gemm"}
    assert theirs == {} and seen["wide"]["launched"] == ["linear_kernel"]


def test_persistent_programs_are_tried_with_tiles_of_their_own_where_a_gpu_has_tensor_descriptors(seen):
    for found in seen["persistent"].values():
        assert {"linear_kernel", "epilogue_kernel"} <= set(found["tried"])
    found = seen["persistent"]["sm_90"]
    assert found["settings"].pop("persistent(16384, 192, 192, 2, sm_90, residual)") is True
    assert {asked.partition("(")[0] for asked in found["settings"]} <= {"persistent_gemm"}
    assert found["launched"] == ["persistent_linear_kernel"]


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_persistent_programs_are_not_tried_elsewhere(target, seen):
    found = seen["persistent"][target]
    assert "persistent_linear_kernel" not in found["tried"]
    assert not [asked for asked in found["settings"] if asked.startswith("persistent")]


def test_the_kernel_that_a_question_leaves_out_is_tried_before_it():
    questions = {"vendor(a)": False, "persistent(b)": False, "gemm(b)": Tile(64, 64, 32, 4, 2)}
    assert [asked for asked, _ in in_turn(questions)] == ["gemm(b)", "persistent(b)", "vendor(a)"]


def test_what_kernels_are_chosen_is_told():
    settings = {"vendor(a)": False, "persistent(b)": True, "persistent_gemm(b)": Tile(64, 64, 32, 4, 2)._asdict()}
    assert kernels_chosen(settings) == ["persistent"] and kernels_chosen({}) == []


def test_neighbours_are_a_step_away_and_within_bounds():
    found = list(neighbours("gemm(1, 2)", Tile(64, 16, 32, 8, 1)))
    assert Tile(128, 16, 32, 8, 1) in found and Tile(64, 16, 32, 8, 2) in found and Tile(32, 16, 32, 4, 1) in found
    assert len(found) == len(set(found))
    assert all(tile.columns >= 16 and tile.num_stages >= 1 and tile.num_warps <= 8 for tile in found)


def test_of_two_tiles_one_at_a_time_moves():
    tiles = (AttentionTile(64, 32, 4, 2), AttentionTile(32, 64, 4, 2))
    for other in neighbours("attention_backward(64, 2, sm_90)", tiles):
        assert sum(ours != theirs for ours, theirs in zip(other, tiles, strict=True)) == 1


def test_what_follows_from_the_shape_is_not_tuned():
    assert tunable("mlp(192, sm_90)") and not tunable("finish_layer_norm_linear(sm_90)")
    assert all(tile.depth == 192 for tile in neighbours("mlp(192, sm_90)", Tile(64, 32, 192, 8, 1)))
    assert set(neighbours("layer_norm_rows(384, (2,), sm_90)", (4, 4))) == {(2, 4), (8, 4), (4, 2), (4, 8)}


def test_results_that_differ_by_more_than_rounding_do_not_agree():
    torch.manual_seed(0)
    expected = [torch.randn(100), torch.randn(100) * 1e-9]
    assert _agree([expected[0] * (1 + 1e-5), torch.zeros(100)], expected)
    assert not _agree([expected[0] * 1.01, expected[1]], expected)
    assert not _agree([expected[0] * float("nan"), expected[1]], expected)


def test_an_operator_that_memory_does_not_suffice_for_is_named_and_the_next_one_tuned():
    """At the larger batch there is less than a timing takes. Stock operators stand for the kernels."""

    class Clock:
        def calls(self, call) -> int:
            return 1

        def seconds(self, call, calls: int) -> float:
            if call().shape[0] == 8:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
            return 1.0

    layer_norm = OPERATORS["layer_norm"]
    layer_norm = copy.copy(layer_norm)
    layer_norm.launcher = layer_norm.stock
    large, small = (
        OperatorCase(layer_norm, "x=3x64fp32", batch, (torch.ones(batch, 3, 64), None, None, 1e-6)) for batch in (8, 2)
    )
    failed, found = tune([large, small], Clock(), 1, lambda what: None)
    assert failed.failure == "out of memory at batch 8" and failed.choice == (False, {}) and failed.seconds == {}
    assert found.failure is None and found.seconds["shipped"] == 1.0
