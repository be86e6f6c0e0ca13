"""What `deit-fast tune` and `deit-fast bench` do on a GPU, on stand-ins for one; a process of its own.

Not reached without one: autocast on the device, events, the kernels' own time and metadata in a profile, and what
torch.compile and CUDA graphs make of a model.
"""

import pytest

from tests.support.compiled import printed_by


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.cli.gpu_checks")


def settings(files: dict, operator: str) -> dict:
    return files[operator]["2"]["settings"]


def test_tune_writes_the_fastest_that_neither_spills_nor_computes_something_else(seen):
    (tile,) = settings(seen["tune"]["files"], "linear_residual").values()
    assert (tile["rows"], tile["depth"]) == (32, 32)
    rows = {rows for rows, _ in seen["tune"]["timed"]}
    assert rows == {32}
    assert "linear_residual" in seen["tune"]["printed"] and seen["tune"]["code"] == 0


def test_an_operator_that_memory_does_not_suffice_for_is_named_and_the_others_are_tuned(seen):
    assert "out of memory at batch 2" in seen["tune"]["printed"]
    assert sorted(seen["tune"]["files"]) == ["layer_norm", "linear_residual", "patch_embed", "readout_attention"]


def test_bench_tunes_what_was_not_tuned_before(seen):
    assert "4 of 5 operators are as they were tuned before" in seen["bench"]["printed"]
    assert seen["bench"]["files"] == {**seen["tune"]["files"], "mlp": seen["bench"]["files"]["mlp"]}
    assert "5 of 5 operators are as they were tuned before" in seen["again"]["printed"]
    assert "tuned before" not in seen["ops"]["printed"]


def test_bench_measures_what_runs_on_gpus_alone(seen):
    rows = {row["contender"]: row for row in seen["bench"]["results"]["rows"]}
    assert {row["failure"] for row in rows.values()} == {None}
    assert {row["peak_bytes"] for row in rows.values()} == {12345}
    assert {"timm, compiled max-autotune", "deit_fast, CUDA graphs"} <= rows.keys()
    assert seen["bench"]["modes"] == ["max-autotune", "reduce-overhead"]
    assert rows["deit_fast, tuned"]["seconds"] < rows["deit_fast"]["seconds"] < rows["timm"]["seconds"]
    assert seen["bench"]["code"] == seen["again"]["code"] == 0


def test_bench_shows_where_a_steps_time_goes_and_the_measured_peaks(seen):
    (kernels,) = seen["bench"]["results"]["kernels"].values()
    assert {kernel["name"]: kernel["calls"] for kernel in kernels}["mlp_kernel"] == pytest.approx(1)
    assert "## Kernels: deit_tiny" in seen["bench"]["page"]
    assert seen["bench"]["results"]["peaks"]["flops"].keys() == {"bfloat16"}


def test_bench_measures_operators_and_their_backward_beside_peers(seen):
    assert seen["ops"]["code"] == 0
    found = {(row["operator"], row["contender"]): row["failure"] for row in seen["ops"]["rows"]}
    assert {(operator, contender) for operator in ("mlp", "linear_backward", "layer_norm_linear_backward")
            for contender in ("stock", "deit_fast", "deit_fast, tuned")} <= found.keys()  # fmt: skip
    assert set(found.values()) <= {None, "liger_kernel is not installed", "apex is not installed"}
