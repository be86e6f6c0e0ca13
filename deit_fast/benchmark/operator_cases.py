"""The operator calls of a model's step, with the tensors that they are called with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from deit_fast.benchmark.contenders import CONTENDERS, ModelCase
from deit_fast.benchmark.measure import TimedStep
from deit_fast.kernels.launching import tuned
from deit_fast.ops.operator import OPERATORS, Operator


@dataclass
class OperatorCase:
    """One operator at one shape. times: how often a step calls it."""

    operator: Operator
    shape: str
    batch: int
    arguments: tuple
    times: int = 0

    @property
    def title(self) -> str:
        return f"{self.operator.name} {self.shape.replace(',', ' ')}, batch {self.batch}"


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, int], OperatorCase] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func.namespace == "deit_fast":
            operator = OPERATORS[func._schema.name.partition("::")[2]]
            shape, batch = tuned.described(operator.arguments, args)
            key = (operator.name, shape, batch)
            if key not in self.found:
                # Shared with the step, which may go on to write them.
                kept = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), args)
                self.found[key] = OperatorCase(operator, shape, batch, kept)
            self.found[key].times += 1
        return func(*args, **(kwargs or {}))


def operator_cases(case: ModelCase, device: torch.device) -> list[OperatorCase]:
    """Of a swapped model's step, in the order of their first calls."""
    return calls_of(TimedStep(CONTENDERS["deit_fast"].prepare(case, device), case, device, case.batch))


def calls_of(step: Callable[[], object]) -> list[OperatorCase]:
    """Of one call of `step`; untuned, whatever was measured before."""
    torch.manual_seed(0)
    with tuned.enabled(False), _Calls() as calls:
        step()
    return list(calls.found.values())
