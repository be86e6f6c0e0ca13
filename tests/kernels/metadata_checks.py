"""What each operator's launches tell a profiler, beside its FLOP formula; prints JSON for `test_metadata`.

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json
from unittest import mock

import torch
from triton.runtime import jit

from deit_fast.benchmark.flops import flop_counter
from deit_fast.benchmark.standin_driver import recording
from deit_fast.benchmark.targets import TARGETS
from deit_fast.cli.check_cases import INTERPRETER_SIZES, OPS, cases
from deit_fast.ops import backend
from tests.kernels.replay_checks import Gpu, of_case


class Described(Gpu):
    """Notes every launch's metadata."""

    def __init__(self) -> None:
        super().__init__()
        self.metadata: list[dict] = []

    def run_kernel(self, kernel, *args, grid, warmup, **options):
        compiled = super().run_kernel(kernel, *args, grid=grid, warmup=warmup, **options)
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        self.metadata.append(kernel.launch_metadata(grid, compiled, given))
        return compiled


def main() -> None:
    gpu, found = Described(), []
    with (
        recording(TARGETS["sm_90"]),
        backend.forced("triton"),
        mock.patch.object(jit.JITFunction, "run", lambda kernel, *a, **k: gpu.run_kernel(kernel, *a, **k)),
    ):
        for op in OPS:
            for case in cases(op, INTERPRETER_SIZES[0], torch.bfloat16, torch.device("cpu")):
                function = of_case(case)
                with flop_counter() as counter:
                    function()
                gpu.metadata.clear()
                function()
                told = sum(value for each in gpu.metadata for name, value in each.items() if name.startswith("flops"))
                found.append(
                    {
                        "title": f"{op} {case.title}",
                        "formula": counter.get_total_flops(),
                        "told": told,
                        "metadata": list(gpu.metadata),
                    }
                )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
