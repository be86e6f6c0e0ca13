"""Compiles persistent products of DeiT-S and -B ahead of time, and launches one anew and from its plan.

Prints what they take and ask for, as JSON for `test_persistent`. A program of its own because the test process has
TRITON_INTERPRET set.
"""

import json
from unittest import mock

import torch
import triton
from triton.runtime import _allocation, driver

from deit_fast import ops
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels import linear
from deit_fast.kernels.launching import hardware, memory, replay
from deit_fast.kernels.linear import settings
from deit_fast.ops import backend
from evidence.kernels import _row, compiled, problem

BFLOAT16 = torch.bfloat16


def launched(width: int, batch: int) -> None:
    """The products of a block: QKV, projection, FC1 for inference and for training, FC2."""
    x, hidden = (torch.zeros(batch, 198, n, dtype=BFLOAT16) for n in (width, 4 * width))
    into, back = torch.zeros(4 * width, width, dtype=BFLOAT16), torch.zeros(width, 4 * width, dtype=BFLOAT16)
    vector, factors = torch.zeros(4 * width, dtype=BFLOAT16), torch.ones(batch)
    linear.linear(x, into[: 3 * width], vector[: 3 * width], "none")
    linear.linear_residual(x, into[:width], vector[:width], x, None, None)
    linear.linear(x, into, vector, "gelu")
    linear.layer_norm_fc1(x, None, None, 1e-6, into, vector, "gelu")
    linear.linear_residual(hidden, back, vector[:width], x, vector[:width], factors)


def resources() -> list[dict]:
    found = []
    for name in sorted(hardware.TENSOR_DESCRIPTORS):
        with recording(TARGETS[name], compiling=False) as launches:
            for width, batch in ((384, 1), (384, 64), (768, 64)):
                launched(width, batch)
        for launch in {launch.key: launch for launch in launches}.values():
            if launch.kernel != "layer_norm_kernel":
                row = compiled(_row(launch, "bf16", ""))
                found.append({"target": name, "kernel": launch.kernel, "problem": problem(row)})
    return found


def scratch() -> dict:
    """What a launch asks of Triton's allocator, as CUDA's launcher does, through Triton and then from a plan."""
    asked, sizes = [], []

    def launcher(source: object, metadata: object):
        def launch(*arguments: object) -> None:
            asked.append(_allocation._allocator.get())
            sizes.append(metadata.global_scratch_size * arguments[0])

        return launch

    def own(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        raise AssertionError("not for our launches")

    triton.set_allocator(own)
    x, weight = torch.zeros(64, 64, dtype=BFLOAT16), torch.zeros(256, 64, dtype=BFLOAT16)
    with recording(TARGETS["sm_90"]) as launches, replay.enabled(True), torch.no_grad():
        driver.active.launcher_cls = launcher
        for _ in range(2):
            ops.linear(x, weight, None)
    return {
        "anew": len(launches),
        "again": len(asked) - len(launches),
        "bytes": sizes,
        "own allocator stays": set(asked) == {memory._scratch} and _allocation._allocator.get() is own,
    }


def main() -> None:
    torch.set_num_threads(1)
    with (
        backend.forced("triton"),
        mock.patch.object(settings, "persistent", lambda *_: True),
        mock.patch.object(settings, "vendor", lambda *_: False),
    ):
        print(json.dumps({"launches": resources(), "scratch": scratch()}))


if __name__ == "__main__":
    main()
