"""Tunes a small model's operators on a stand-in for a GPU, whose clock has its own taste, and runs them tuned.

Prints what was chosen and launched, as JSON for `test_tune`. A program of its own because the test process has
TRITON_INTERPRET set.
"""

import json
import os
import tempfile
import warnings
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch

from deit_fast.benchmark import tune
from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.operator_cases import OperatorCase, operator_cases
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.launching import hardware, replay, tuned
from deit_fast.kernels.linear import vendor_gemm
from deit_fast.ops import backend
from deit_fast.ops.operator import OPERATORS

CASE = ModelCase("deit_tiny_distilled_patch16_224", 4, 32, "bfloat16", training=True)
CPU = torch.device("cpu")


class Clock:
    """Likes rows of 64, steps of 32, the stock operators for attention; `liking` more than all.

    The vendor's GEMM a little less than our tiles, unless for what follows it.
    """

    def __init__(self, launches: list, liking: str = "") -> None:
        self.launches, self.liking = launches, liking

    def calls(self, call) -> int:
        call()
        return 1

    def seconds(self, call, calls: int) -> float:
        self.launches.clear()
        call()
        if not self.launches:
            return 2.0
        return sum(self._taste(each) for each in self.launches) / len(self.launches)

    def _taste(self, each) -> float:
        if "attention" in each.kernel:
            return 3.0
        if each.kernel == "multiply":
            return 1.1
        if each.kernel == self.liking:
            return 0.5
        options = each.constexprs
        # A weight's gradient calls its rows OUT_BLOCK.
        rows = options.get("OUT_BLOCK", options.get("ROW_BLOCK", 64))
        return 1 + abs(rows - 64) / 1000 + abs(options.get("DEPTH_BLOCK", 32) - 32) / 100


def tuned_settings(launches: list) -> dict:
    """Every operator of the step by name: whether stock was chosen, the settings, how many were tried."""
    found = {}
    cases = operator_cases(CASE, CPU)
    # Nothing runs here, so nothing is computed to compare.
    with mock.patch.object(tune, "_agree", lambda found, expected: True):
        for result in tune.tune(cases, Clock(launches), 3, lambda what: None):
            name, case = result.case.operator.name, result.case
            if result.failure is None:
                tuned.write(name, case.shape, "sm_90", hardware.driver_version(), case.batch, result.choice)
            found.setdefault(name, []).append(
                {"stock": result.choice.stock, "settings": result.choice.settings, "tried": result.tried,
                 "seconds": result.seconds, "failure": result.failure}
            )  # fmt: skip
    return found


def launched(launches: list) -> list:
    """Kernels of a step, each with its rows and depth."""
    replay.forget()
    launches.clear()
    operator_cases(CASE, CPU)
    untuned = [_shown(each) for each in launches]
    launches.clear()
    with mock.patch.object(tuned, "enabled", lambda on: mock.MagicMock()):
        operator_cases(CASE, CPU)
    return [untuned, [_shown(each) for each in launches]]


def narrow_rows(launches: list) -> dict:
    """Of LayerNorm and FC1 that fill the device: what is chosen as shipped, and liking other kernels."""
    x, weight = torch.zeros(64, 198, 192, dtype=torch.bfloat16), torch.zeros(576, 192, dtype=torch.bfloat16)
    operator = OPERATORS["layer_norm_fc1"]
    arguments = (x, None, None, 1e-6, weight, None, "gelu", None, None)
    case = OperatorCase(operator, *tuned.described(operator.arguments, arguments), arguments)
    found = {}
    with mock.patch.object(tune, "_agree", lambda found, expected: True):
        for liking in ("linear_kernel", "epilogue_kernel"):
            (result,) = tune.tune([case], Clock(launches, liking), 3, lambda what: None)
            found[liking] = result.choice.settings
    return found


def wide_rows(launches: list) -> dict:
    """Of DeiT-B's FC2, which the vendor's GEMM computes as shipped; what is launched, liking ours."""
    x, hidden = torch.zeros(64, 198, 768, dtype=torch.bfloat16), torch.zeros(64, 198, 3072, dtype=torch.bfloat16)
    weight = torch.zeros(768, 3072, dtype=torch.bfloat16)
    operator = OPERATORS["linear_residual"]
    arguments = (hidden, weight, None, x, None, None, None)
    case = OperatorCase(operator, *tuned.described(operator.arguments, arguments), arguments)
    found = {}
    with mock.patch.object(tune, "_agree", lambda found, expected: True):
        for liking in ("epilogue_kernel", "linear_kernel"):
            (result,) = tune.tune([case], Clock(launches, liking), 3, lambda what: None)
            found[liking] = result.choice.settings
    tuned.write("linear_residual", case.shape, "sm_90", hardware.driver_version(), case.batch, result.choice)
    replay.forget()
    launches.clear()
    with torch.no_grad():
        torch.ops.deit_fast.linear_residual(*arguments)
    return {**found, "launched": [each.kernel for each in launches]}


class WatchingClock(Clock):
    """Notes every kernel that it times."""

    def __init__(self, launches: list, liking: str) -> None:
        super().__init__(launches, liking)
        self.seen: set[str] = set()

    def _taste(self, each) -> float:
        self.seen.add(each.kernel)
        return super()._taste(each)


def persistent_programs(target: str) -> dict:
    """Of a product with a residual on a GPU that likes these: what is tried, what is chosen, what is then launched."""
    x, weight = torch.zeros(64, 198, 192, dtype=torch.bfloat16), torch.zeros(192, 192, dtype=torch.bfloat16)
    operator = OPERATORS["linear_residual"]
    arguments = (x, weight, None, x, None, None, None)
    case = OperatorCase(operator, *tuned.described(operator.arguments, arguments), arguments)
    with (
        recording(TARGETS[target], compiling=False) as launches,
        mock.patch.object(tune, "_agree", lambda found, expected: True),
        torch.no_grad(),
    ):
        clock = WatchingClock(launches, "persistent_linear_kernel")
        (result,) = tune.tune([case], clock, 3, lambda what: None)
        tuned.write("linear_residual", case.shape, target, hardware.driver_version(), case.batch, result.choice)
        replay.forget()
        launches.clear()
        torch.ops.deit_fast.linear_residual(*arguments)
    launched = [each.kernel for each in launches]
    return {"tried": sorted(clock.seen), "settings": result.choice.settings, "launched": launched}


def around_the_vendors_gemm(launches: list) -> dict:
    """What is chosen for the layers that end in a residual, and what a step then launches for them."""
    choices = []
    with mock.patch.object(tune, "_agree", lambda found, expected: True):
        # DeiT III has drop path in the first block too.
        dropping = replace(CASE, model="deit3_small_patch16_224", drop_path=0.5)
        found = operator_cases(CASE, CPU) + operator_cases(dropping, CPU)
        cases = [case for case in found if case.operator.name == "linear_residual"]
        for result in tune.tune(cases, Clock(launches, "epilogue_kernel"), 3, lambda what: None):
            choices.append([result.failure, "kept" in result.case.shape.split(","), result.choice.settings])
            tuned.write("linear_residual", result.case.shape, "sm_90", hardware.driver_version(), 4, result.choice)
    return {"choices": choices, "launches": launched(launches)[1]}


def _shown(each) -> list:
    return [each.kernel, each.constexprs.get("ROW_BLOCK"), each.constexprs.get("DEPTH_BLOCK")]


def refused(launches: list) -> dict:
    """What happens where a file's setting does not fit the table."""
    arguments = (*(torch.zeros(shape, dtype=torch.bfloat16) for shape in ((4, 192), (64, 192))), None, "none")
    shape, batch = tuned.described(OPERATORS["linear"].arguments, arguments)
    settings = {"gemm(128, 64, 192, 2, sm_90, none)": {"rows": 1}}
    tuned.write("linear", shape, "sm_90", hardware.driver_version(), batch, tuned.Choice(False, settings))
    replay.forget()
    launches.clear()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            torch.ops.deit_fast.linear(*arguments)
    return {"said": [str(each.message) for each in said], "launches": [each.kernel for each in launches]}


def main() -> None:
    import timm

    create = timm.create_model
    with (
        mock.patch.object(timm, "create_model", lambda name, **options: create(name, depth=2, **options)),
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DEIT_FAST_TUNED": folder}),
        recording(TARGETS["sm_90"], compiling=False) as launches,
        mock.patch.object(
            vendor_gemm, "multiply", lambda *_: launches.append(SimpleNamespace(kernel="multiply", constexprs={}))
        ),
        backend.forced("triton"),
    ):
        found = tuned_settings(launches)
        untuned, heeded = launched(launches)
        broken = refused(launches)
        narrow = narrow_rows(launches)
        wide = wide_rows(launches)
        vendor = around_the_vendors_gemm(launches)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, {"DEIT_FAST_TUNED": folder}),
        backend.forced("triton"),
    ):
        persistent = {target: persistent_programs(target) for target in ("sm_90", "sm_80", "gfx942")}
    print(
        json.dumps(
            {"found": found, "untuned": untuned, "heeded": heeded, "broken": broken, "vendor": vendor,
             "narrow": narrow, "wide": wide, "persistent": persistent}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
