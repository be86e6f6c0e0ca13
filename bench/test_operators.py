"""Every operator at the shapes of DeiT-Ti and -S, beside its stock form: `pytest bench/ --benchmark-only`.

On a GPU where there is one: without, an operator is its stock form, and there is nothing to compare.
"""

from functools import cache

import pytest
import torch

from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.operator_cases import OperatorCase, operator_cases
from deit_fast.ops.operator import OPERATORS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, DTYPE = (64, "bfloat16") if DEVICE.type == "cuda" else (2, "float32")


@cache
def _cases(size: str) -> dict[str, OperatorCase]:
    """Of an inference and a training step, by operator: the first shape of each."""
    found: dict[str, OperatorCase] = {}
    for training in (False, True):
        case = ModelCase(f"deit_{size}_distilled_patch16_224", BATCH, 224, DTYPE, training=training)
        for each in operator_cases(case, DEVICE):
            found.setdefault(each.operator.name, each)
    return found


@pytest.mark.parametrize("how", ["stock", "deit_fast"])
@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize("size", ["tiny", "small"])
def test_operator(benchmark, size, operator, how):
    case = _cases(size).get(operator)
    if case is None:
        pytest.skip(f"timm's DeiT does not call {operator}")
    function = case.operator.stock if how == "stock" else case.operator.op

    def run() -> None:
        function(*case.arguments)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.title
    with torch.no_grad():
        benchmark.pedantic(run, rounds=5, warmup_rounds=2)
