"""Every operator's kernels under one release of Triton: computed in the interpreter, and compiled ahead of time.

`make versions` runs this with the oldest and the newest release supported. Its name keeps it out of `make test`.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton

from deit_fast.check import operators
from deit_fast.check.cases import OPS
from deit_fast.kernels.linear import settings
from tests.support.compiled import printed_by


def test_the_release_is_the_one_asked_for():
    assert triton.__version__ == os.environ["TRITON_VERSION"]


@pytest.mark.parametrize("op", OPS)
def test_in_the_interpreter_every_result_is_as_accurate_as_stocks(op, monkeypatch):
    _assert_accurate(op, monkeypatch)


def test_so_are_persistent_programs(monkeypatch):
    monkeypatch.setattr(settings, "persistent", lambda *_: True)
    _assert_accurate("linear", monkeypatch)


def _assert_accurate(op, monkeypatch):
    monkeypatch.setattr(operators, "INTERPRETER_DTYPES", operators.DTYPES)  # `tests.support` makes bfloat16 right
    lines = [line for _, group in operators.check(torch.device("cpu"), (op,)) for line in group]
    assert {line.dtype for line in lines} == {"float32", "float16", "bfloat16"}
    failed = [line.traceback or str(line) for line in lines if line.failure]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel_compiles(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.versions.compiled_kernels", target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) > 20
    assert not {kernel: error for kernel, error in errors.items() if error}


def test_plans_make_their_launches_again():
    seen = printed_by("-m", "tests.kernels.launching.replay_checks")
    assert seen["runs"] and all(seen["apart"].values())
    assert all(case["same"] for case in seen["seen"] if not case["anew"])


def test_compiled_kernels_are_named_by_what_is_fused():
    for symbols in printed_by("-m", "tests.kernels.launching.metadata_checks")["symbols"].values():
        assert all(symbol.startswith("linear_kernel_bias_") for symbol in symbols[:2])
