"""Multiplies float32 on a GPU that only notes what it is given, changes PyTorch's settings, and multiplies again.

Prints what the launches were told, by the settings made, as JSON for `test_tf32`. A program of its own because the test
process has TRITON_INTERPRET set, and a process for each because settings pile up.
"""

import json
import os
from unittest import mock

import torch
from triton.runtime import jit

from deit_fast import ops
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.launching import replay, tf32
from deit_fast.ops import backend
from tests.kernels.launching.replay_checks import Gpu
from tests.kernels.launching.test_tf32 import PROGRAMS


def told(gpu: Gpu) -> tuple[str, bool]:
    """The precision that a product is launched with, and whether it went through Triton."""
    x, weight = torch.zeros(4, 16, 64), torch.zeros(64, 64)
    [[_, _, arguments]], _, anew = gpu.launches(lambda: ops.linear(x, weight, None))
    return next(a for a in arguments if a in ("ieee", "tf32", "tf32x3")), anew > 0


def products(program: tuple[str, ...]) -> dict:
    gpu = Gpu()
    with (
        recording(TARGETS["sm_90"]),
        replay.enabled(True),
        backend.forced("triton"),
        mock.patch.object(jit.JITFunction, "run", lambda kernel, *a, **k: gpu.run_kernel(kernel, *a, **k)),
        torch.no_grad(),
    ):
        before = told(gpu), told(gpu)
        for statement in program:
            exec(statement)
        return {"before": before, "after": (told(gpu), told(gpu))}


def convolutions() -> dict:
    tf32.forbid_in_convolutions()
    return {
        "convolutions": torch.backends.cudnn.conv.fp32_precision,
        "allow_tf32": torch.backends.cudnn.allow_tf32,
        "matrices": tf32.is_allowed(),
    }


def in_a_process(program: tuple[str, ...]) -> dict:
    reading, writing = os.pipe()
    if os.fork() == 0:
        try:
            answer = products(program) | convolutions()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = json.load(pipe)
    os.wait()
    return answer


def main() -> None:
    torch.set_num_threads(1)
    products(())  # what is imported at a first call is imported once
    print(json.dumps({"; ".join(program): in_a_process(program) for program in PROGRAMS}))


if __name__ == "__main__":
    main()
