"""Compiles what every operator launches for one GPU, forward and backward; prints kernel → error as JSON.

    python -m tests.versions.compiled_kernels sm_90

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json
import sys
import warnings
from dataclasses import replace
from unittest import mock

import torch

from deit_fast.check.cases import DEIT_SIZES, OPS, cases
from deit_fast.check.operators import evaluate
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.linear import settings

SIZE = replace(DEIT_SIZES[0], batch=2)
DTYPE = torch.bfloat16


def main() -> None:
    warnings.filterwarnings("error", message="deit_fast")
    # What this release is known not to compile (`hardware.no_separate_projections`) stock PyTorch computes.
    warnings.filterwarnings("ignore", message="deit_fast.*; Triton 3.7 does")
    with recording(TARGETS[sys.argv[1]]) as launches:
        for op in OPS:
            for case in cases(op, SIZE, DTYPE, torch.device("cpu")):
                evaluate(case, DTYPE, "triton")
        # As `deit-fast tune` may choose.
        with mock.patch.object(settings, "persistent", lambda *_: True):
            for case in cases("linear", SIZE, DTYPE, torch.device("cpu")):
                evaluate(case, DTYPE, "triton")
    failed = {each.kernel: str(each.error) for each in launches if each.error}
    print(json.dumps({each.kernel: None for each in launches} | failed))


if __name__ == "__main__":
    main()
