"""The launch table: what it covers, and what it calls a fault. Its whole is `make kernels-all`."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from evidence.kernels import markdown, page, problem, regression, summary, write

TARGETS = ("sm_90", "gfx942")
COMMITTED = Path("evidence/results/kernels.json")
FORWARD = {
    "attention_kernel",
    "epilogue_kernel",
    "layer_norm_kernel",
    "linear_kernel",
    "normalise_pixels_kernel",
    "patch_embed_kernel",
    "readout_kernel",
}
BACKWARD = {
    "branch_gradient_kernel",
    "column_sums_kernel",
    "distillation_loss_kernel",
    "finish_layer_norm_linear_kernel",
    "finish_linear_kernel",
    "image_gradient_kernel",
    "input_gradient_epilogue_kernel",
    "input_gradient_kernel",
    "keep_samples_kernel",
    "key_gradient_kernel",
    "layer_norm_backward_kernel",
    "patch_weight_gradient_kernel",
    "query_gradient_kernel",
    "readout_backward_kernel",
    "scaled_weight_kernel",
    "sum_partials_kernel",
    "sum_splits_kernel",
    "token_gradients_kernel",
    "weight_gradient_kernel",
}


def test_no_launch_has_a_problem_or_takes_more_than_committed(tmp_path):
    """A subset, compiled anew."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = {
        "--targets": ",".join(TARGETS),
        "--models": "tiny,transformers-small",
        "--precisions": "bf16",
        "--out": str(tmp_path),
        "--against": str(COMMITTED),
    }
    command = [sys.executable, "-m", "evidence.kernels"]
    command += [part for option in options.items() for part in option]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    kernels = defaultdict(set)
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    for row in rows:
        kernels[row["target"]].add(row["kernel"])
    assert kernels["gfx942"] == FORWARD | BACKWARD
    assert kernels["sm_90"] == FORWARD | BACKWARD


GOOD = {
    "id": "0", "target": "sm_90", "kernel": "k", "precision": "bf16", "models": [], "error": None, "tensors": {},
    "constexprs": {}, "warps": 4, "stages": 1, "registers": 64, "spilled": 0, "shared_memory": 100, "programs": 4,
    "code": 512, "dots": 1, "scalar_dots": 0, "tensor_core": {"mma.sync": 4}, "widest_store": 16, "wide_loads": 1.0,
    "wide_stores": None, "grid": [4, 1, 1], "floor": 10.0, "floor_of": "issue",
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"error": "CompilationError: x"}, "does not compile"),
        ({"spilled": 8}, "8 bytes of registers spilled"),
        ({"shared_memory": 2**20}, "1048576 bytes of shared memory where 232448"),
        ({"scalar_dots": 1}, "without tensor-core"),
        ({"tensor_core": {}}, "without tensor-core"),
        ({"tensor_core": {}, "precision": "fp32"}, "without tensor-core"),
        ({"wide_loads": 0.5}, "50% of loads 128 bits wide"),
    ],
)
def test_each_fault_is_a_problem(fault, said):
    assert problem(GOOD) is None
    assert said in problem(GOOD | fault)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared_memory": 101}, "101 bytes"),
        ({"programs": 3}, "3 programs"),
        ({"tensor_core": {"wgmma": 4}}, "no mma.sync as before"),
        ({"wide_loads": 0.5}, "50% of loads 128 bits wide, before 100%"),
        ({"floor": 10.11}, "a floor of 10.11 µs (issue), before 10.0"),
        ({"floor": None, "floor_of": "no way"}, "no floor as before: no way"),
    ],
)
def test_whatever_takes_more_than_before_is_a_regression(change, said):
    assert regression(GOOD, GOOD) is None
    assert said in regression(GOOD | change, GOOD)


def test_floors_of_other_sizes_or_of_a_table_without_them_are_not_compared():
    slower = GOOD | {"floor": 20.0}
    assert regression(slower, GOOD | {"grid": [5, 1, 1]}) is None
    assert regression(slower, GOOD | {"tensors": {"x_ptr": "8×8 float32"}}) is None
    assert regression(slower, GOOD | {"floor": None}) is None
    assert regression(slower, {name: value for name, value in GOOD.items() if not name.startswith("floor")}) is None
    assert regression(GOOD | {"floor": 10.09}, GOOD) is None


def test_a_launch_that_was_never_looked_at_is_a_regression():
    assert "does not have" in regression(GOOD, None)


def test_the_page_has_a_line_for_each_kernel_and_target_with_the_worst_of_its_launches():
    worse = GOOD | {"registers": 200, "programs": 1, "wide_loads": 0.95}
    broken = GOOD | {"target": "gfx942", "error": "CompilationError: x"}
    lines = markdown([GOOD, worse, broken]).splitlines()[2:]
    assert len(lines) == 2
    assert (
        lines[0] == "| k | sm_90 | 2 | 4 | 1 | 200 (255) | 0 | 100 (232448) | 1–4 | mma.sync | 95 % | – | 512 | 10–10 |"
    )
    assert "does not compile" in lines[1]
    assert summary([GOOD, worse, broken]).startswith("3 launches on 2 targets, 1 kernels; 1 with a problem; 1 of which")
    text = page([GOOD, worse, broken], {"sm_80": ["too wide"], "sm_90": ["too wide"], "gfx942": []})
    assert lines[0] in text
    assert "- sm_80, sm_90: too wide\n" in text


def test_a_run_replaces_its_own_targets_rows_and_keeps_the_others(tmp_path):
    write(tmp_path, [GOOD, GOOD | {"target": "gfx942"}], {"sm_90": ["too wide"], "gfx942": []})
    write(tmp_path, [GOOD | {"id": "1"}], {"sm_90": []})
    read = json.loads((tmp_path / "kernels.json").read_text())
    assert [(row["target"], row["id"]) for row in read["rows"]] == [("sm_90", "1"), ("gfx942", "0")]
    assert read["left_to_stock"] == {"sm_90": [], "gfx942": []}
    assert "too wide" not in (tmp_path / "kernels.md").read_text()
