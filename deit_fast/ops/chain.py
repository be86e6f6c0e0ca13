"""Operators that always follow one another, launched by one plan: what a call costs the host, it costs once.

A chain's plan is made of its operators' plans. The first call of a shape notes which plan each operator ran, and by
their addresses which tensors went where; later calls only run the plans.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.kernels.launching.expressions import procedure, tuple_of
from deit_fast.kernels.launching.replay import Plan, Replayed
from deit_fast.ops import backend


class Step(NamedTuple):
    """An operator's call: its plan, or None where it has none; the addresses it was given, and what it returned."""

    plan: Plan | None
    pointers: list[int]
    result: Any


# By thread, since autograd's backward has threads of its own. Empty but for the first calls of a shape.
noting: dict[int, list[Step]] = {}


def note(plan: Plan | None, pointers: list[int], result: object) -> None:
    """An operator has run; `noting` is not empty."""
    steps = noting.get(get_ident())
    if steps is not None:
        steps.append(Step(plan, pointers, result))


@contextmanager
def _noted() -> Iterator[list[Step]]:
    """Fills with what operators this thread runs."""
    steps = noting[get_ident()] = []
    try:
        yield steps
    finally:
        del noting[get_ident()]


class Chain(Replayed):
    """`launcher` calls operators and nothing else that computes, without gradients."""

    def run(self, flat: tuple) -> Any:
        """`launcher(*flat)`, by a plan where one is known and nobody watches the operators."""
        if torch._C._len_torch_dispatch_stack() or torch._C._autograd._profiler_enabled():
            return self.launcher(*flat)
        plan, key, pointers = self.plan((), flat)
        if plan is not None:
            try:
                return plan.run(*pointers)
            except Exception as error:
                backend.raise_if_not_the_kernels(error, flat[0].device)
                self.drop(key, error)
        if key is None or key in self.plans or not self.plans_calls():
            return self.launcher(*flat)
        with _noted() as steps:
            result = self.launcher(*flat)
        self.remember(key, _joined(pointers, steps, result))
        return result


def _joined(given: list[int], steps: list[Step], result: Any) -> Plan | None:
    """None where an operator has no plan, or a tensor comes from none of them.

    It runs the plans, and lets go of each tensor after the last that reads it.
    """
    sources = {pointer: f"given_{i}" for i, pointer in enumerate(given)}
    variables: dict[int, str] = {}
    reads: list[list[str | None]] = []
    for i, step in enumerate(steps):
        reads.append([sources.get(pointer) for pointer in step.pointers])
        for j, tensor in enumerate(_tensors(step.result)):
            if tensor is not None:
                variables[id(tensor)] = sources[tensor.data_ptr()] = f"made_{i}_{j}"
    outputs = ["None" if tensor is None else variables.get(id(tensor)) for tensor in _tensors(result)]
    plans = [step.plan for step in steps if step.plan is not None]
    if not plans or len(plans) < len(steps) or None in outputs or any(None in read for read in reads):
        return None

    last_read = {source: i for i, read in enumerate(reads) for source in read}
    lines = []
    for i, (step, read) in enumerate(zip(steps, reads, strict=True)):
        addresses = (f"{each}.data_ptr()" if each in variables.values() else str(each) for each in read)
        lines.append(f"all_{i} = run_{i}({', '.join(addresses)})")
        for j, tensor in enumerate(_tensors(step.result)):
            if (variable := f"made_{i}_{j}") in last_read or variable in outputs:
                lines.append(f"{variable} = all_{i}{'' if tensor is step.result else f'[{j}]'}")
        done = [each for each in variables.values() if last_read.get(each) == i and each not in outputs]
        lines += [f"{each} = None" for each in (f"all_{i}", *done)]
    lines.append(f"return {outputs[0] if isinstance(result, Tensor) else tuple_of(map(str, outputs))}")
    names = {f"run_{i}": plan.run for i, plan in enumerate(plans)}
    run = procedure([f"given_{i}" for i in range(len(given))], lines, **names)
    return Plan(plans[0].device, run, tuple(each for plan in plans for each in plan.compiled))


def _tensors(result: Any) -> list[Tensor | None]:
    return list(result) if isinstance(result, list | tuple) else [result]
