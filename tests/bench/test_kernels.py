"""A part of `python -m bench.kernels`: DeiT-Ti's and -S's launches, forward and backward, fit their devices."""

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from bench.kernels import problem, summary

TARGETS = ("sm_90", "gfx942")


def recorded(tmp_path) -> list[dict]:
    file = tmp_path / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = {
        "--targets": ",".join(TARGETS),
        "--libraries": "timm,transformers",
        "--models": "tiny,small",
        "--precisions": "bf16",
    }
    command = [sys.executable, "-m", "bench.kernels", "--json", str(file)]
    command += [part for option in options.items() for part in option]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(file.read_text())


FORWARD = {"layer_norm_kernel", "linear_kernel", "attention_kernel", "mlp_kernel", "patch_embed_kernel"}
BACKWARD = {
    "column_sums_kernel",
    "distillation_loss_kernel",
    "finish_layer_norm_linear_kernel",
    "finish_linear_kernel",
    "image_gradient_kernel",
    "input_gradient_kernel",
    "key_gradient_kernel",
    "layer_norm_backward_kernel",
    "query_gradient_kernel",
    "sum_partials_kernel",
    "sum_splits_kernel",
    "token_gradients_kernel",
    "weight_gradient_kernel",
}


def test_every_launch_compiles_fits_uses_tensor_cores_and_spills_nothing(tmp_path):
    table = recorded(tmp_path)
    assert [(row["target"], row["kernel"], problem(row)) for row in table if problem(row)] == []
    assert [(row["target"], row["kernel"], row["spilled"]) for row in table if row["spilled"]] == []
    kernels = defaultdict(set)
    for row in table:
        kernels[row["target"]].add(row["kernel"])
    assert kernels == {target: FORWARD | BACKWARD for target in TARGETS}


GOOD = {
    "target": "sm_90", "kernel": "k", "precision": "bf16", "models": [], "error": None, "tensors": {}, "constexprs": {},
    "warps": 4, "stages": 1, "registers": 64, "registers_limit": 255, "spilled": 0, "shared_memory": 100,
    "shared_memory_limit": 200, "dots": 1, "scalar_dots": 0, "tensor_core": {"mma.sync": 4}, "widest_store": 16,
}  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"error": "CompilationError: x"}, "does not compile"),
        ({"shared_memory": 201}, "201 bytes of shared memory where 200"),
        ({"scalar_dots": 1}, "without tensor-core"),
        ({"tensor_core": {}}, "without tensor-core"),
    ],
)
def test_each_fault_is_a_problem(fault, said):
    assert problem(GOOD) is None
    assert said in problem(GOOD | fault)


def test_a_float32_dot_needs_no_tensor_cores():
    assert problem(GOOD | {"precision": "fp32", "tensor_core": {}}) is None


def test_the_summary_counts_and_shows_what_spills():
    text = summary([GOOD, GOOD | {"kernel": "spiller", "spilled": 8}, GOOD | {"error": "CompilationError: x"}])
    assert text.startswith("3 distinct launches; 1 spill registers")
    assert "spiller" in text.split("Most shared memory")[0]
