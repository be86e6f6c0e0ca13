"""Tunes a small model on a stand-in for a GPU, by a clock with a taste of its own.

Prints what came of it, as JSON for `test_tune`. A program of its own because the test process has TRITON_INTERPRET set.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import timm
import torch

import deit_fast
from deit_fast.benchmark import tune as operators
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.launching import tuned as tuned_files
from deit_fast.ops import backend
from deit_fast.runtime.tune import tune_by

IMAGES = torch.zeros(2, 3, 32, 32)


def is_block(kernels: list[str]) -> bool:
    return "attention_kernel" in kernels and not is_model(kernels)


def is_model(kernels: list[str]) -> bool:
    return "attention_kernel" in kernels and "patch_embed_kernel" in kernels


class Clock:
    """A step takes as many seconds as it has launches; its stock form `stock` of their kernels."""

    def __init__(self, launches: list, stock: Callable[[list[str]], float]) -> None:
        self.launches, self.stock, self.timed = launches, stock, 0
        self.kernels: list[str] = []

    def calls(self, call: Callable[[], object]) -> int:
        call()
        return 1

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        self.timed += 1
        self.launches.clear()
        call()
        if self.launches:
            self.kernels = [launch.kernel for launch in self.launches]
            return float(len(self.kernels))
        # Swapped and stock take turns.
        return self.stock(self.kernels)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    found = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10)
    deit_fast.swap(found)
    return found


@contextmanager
def folder() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as place, mock.patch.dict(os.environ, {"DEIT_FAST_TUNED": place}):
        tuned_files.forget()
        yield


def outcome(found: torch.nn.Module, report: deit_fast.SwapReport, clock: Clock) -> dict:
    swapped = deit_fast.report(found).calls
    return {
        "kept": report.kept,
        "swapped": report.swapped,
        "timed": clock.timed,
        "swapped blocks": [name for name in ("blocks.0", "blocks.1") if name in swapped],
    }


def tuned(launches: list, stock: Callable[[list[str]], float], training: bool = False, seconds: float = 1e6) -> dict:
    found, clock = model(), Clock(launches, stock)
    report = tune_by(clock, found, IMAGES, training, time.monotonic(), seconds)
    return outcome(found, report, clock)


def as_before(launches: list) -> dict:
    found = model().train()
    found.blocks[1].eval()
    modes = [module.training for module in found.modules()]
    state = torch.get_rng_state()
    tune_by(Clock(launches, lambda kernels: 1e6), found, IMAGES, False, time.monotonic(), 1e6)
    return {
        "modes": modes == [module.training for module in found.modules()],
        "random numbers": torch.equal(state, torch.get_rng_state()),
        "gradients": all(parameter.grad is None for parameter in found.parameters()),
    }


def main() -> None:
    with (
        recording(TARGETS["sm_90"], compiling=False) as launches,
        backend.forced("triton"),
        mock.patch.object(operators, "_agree", lambda found, expected: True),
    ):
        found = {}
        with folder():
            found["swapped is faster"] = tuned(launches, lambda kernels: 1e6)
            found["again"] = tuned(launches, lambda kernels: 1e6)
            found["training"] = tuned(launches, lambda kernels: 1e6, training=True)
        with folder(), mock.patch("deit_fast.runtime.tune.tune_operators", lambda *args: iter(())):
            found["stock blocks are faster"] = tuned(launches, lambda kernels: 0.5 if is_block(kernels) else 1e6)
            found["again, stock blocks"] = tuned(launches, lambda kernels: 1e6)
        with folder(), mock.patch("deit_fast.runtime.tune.tune_operators", lambda *args: iter(())):
            found["only the whole is slower"] = tuned(launches, lambda kernels: 0.5 if is_model(kernels) else 1e6)
        with folder():
            found["no time"] = tuned(launches, lambda kernels: 0.0, seconds=-1.0)
        with folder():
            found["as before"] = as_before(launches)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
