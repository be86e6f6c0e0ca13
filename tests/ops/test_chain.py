"""Plans of operators joined to one: each runs on what those before it made, no tensor outlives its last reader."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deit_fast.kernels.launching import replay
from deit_fast.kernels.launching.replay import Plan
from deit_fast.ops import backend, chain
from deit_fast.ops.chain import Chain, note


class Operator:
    """Returns `outputs` new tensors, and knows with which addresses its plan ran."""

    def __init__(self, outputs: int, planned: bool = True) -> None:
        self.outputs, self.ran, self.made = outputs, [], []
        self.plan = Plan(0, self.run, ("a kernel",)) if planned else None

    def run(self, *pointers: int) -> Tensor | tuple[Tensor, ...]:
        self.ran.append(pointers)
        found = tuple(torch.zeros(3) for _ in range(self.outputs))
        self.made = [weakref.ref(tensor) for tensor in found]
        self.addresses = [tensor.data_ptr() for tensor in found]
        return found if self.outputs > 1 else found[0]

    def __call__(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        pointers = [tensor.data_ptr() for tensor in tensors]
        found = self.run(*pointers)
        if chain.noting:
            note(self.plan, pointers, found)
        return found


@pytest.fixture(autouse=True)
def plans_are_made(monkeypatch):
    monkeypatch.setattr(Chain, "plans_calls", lambda self: True)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=lambda: 0))
    monkeypatch.setattr(replay, "driver", driver)


def chained(operators: list[Operator], launcher) -> tuple[Chain, Tensor, Tensor]:
    """A chain whose plan exists, and arguments for it."""
    x, weight = torch.zeros(3), torch.zeros(3)
    found = Chain("test", launcher)
    found.run((x, weight))
    for operator in operators:
        operator.ran.clear()
    return found, torch.ones(3), torch.ones(3)


def test_each_plan_runs_on_what_was_given_and_what_those_before_it_made() -> None:
    first, second, third = Operator(2), Operator(1), Operator(3)

    def launcher(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        a, b = first(x, weight)
        c = second(b.view(1, 3), x)
        d, *_ = third(c, a, weight)
        return d, a, c

    found, x, weight = chained([first, second, third], launcher)
    (plan,) = found.plans.values()
    assert plan.compiled == ("a kernel",) * 3
    d, a, c = found.run((x, weight))
    assert first.ran == [(x.data_ptr(), weight.data_ptr())]
    assert second.ran == [(first.addresses[1], x.data_ptr())]
    assert third.ran == [(second.addresses[0], first.addresses[0], weight.data_ptr())]
    assert [d.data_ptr(), a.data_ptr(), c.data_ptr()] == [third.addresses[0], first.addresses[0], second.addresses[0]]


def test_a_tensor_is_let_go_after_the_last_plan_that_reads_it() -> None:
    alive: list[list[bool]] = []
    first, second, third = Operator(2), Operator(1), Operator(1)

    def launcher(x: Tensor, weight: Tensor) -> Tensor:
        a, b = first(x)
        return third(second(a), b)

    found, x, weight = chained([first, second, third], launcher)
    run = third.run

    def noting_what_is_alive(*pointers: int) -> Tensor:
        alive.append([made() is not None for made in (*first.made, *second.made)])
        return run(*pointers)

    (plan,) = found.plans.values()
    plan.run.__globals__["run_2"] = noting_what_is_alive
    gc.disable()
    try:
        found.run((x, weight))
    finally:
        gc.enable()
    assert alive == [[False, True, True]]


def test_without_a_plan_for_every_operator_there_is_none_for_all_and_it_is_not_tried_again() -> None:
    first, second = Operator(1), Operator(1, planned=False)
    calls = []

    def launcher(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(bool(chain.noting))
        return second(first(x))

    found, x, weight = chained([first, second], launcher)
    assert list(found.plans.values()) == [None]
    found.run((x, weight))
    assert calls == [True, False]


@pytest.mark.parametrize("where", ["read", "returned"])
def test_a_tensor_that_no_operator_made_leaves_the_chain_to_its_operators(where) -> None:
    first, second = Operator(1), Operator(1)

    def launcher(x: Tensor, weight: Tensor) -> Tensor:
        between = first(x) + 1
        return second(between) if where == "read" else between

    found, _, _ = chained([first, second], launcher)
    assert list(found.plans.values()) == [None]


def test_a_plan_that_fails_is_dropped_and_the_operators_answer() -> None:
    first = Operator(1)
    found, x, weight = chained([first], lambda x, weight: first(x))
    (plan,) = found.plans.values()

    def failing(*pointers: int) -> Tensor:
        raise TypeError("an integer is no pointer")

    plan.run.__globals__["run_0"] = failing
    assert found.run((x, weight)).shape == (3,)
    assert list(found.plans.values()) == [None]
    assert first.ran == [(x.data_ptr(),)]


def test_where_memory_runs_out_the_error_is_raised() -> None:
    first = Operator(1)
    found, x, weight = chained([first], lambda x, weight: first(x))
    (plan,) = found.plans.values()

    def failing(*pointers: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    plan.run.__globals__["run_0"] = failing
    with pytest.raises(torch.OutOfMemoryError):
        found.run((x, weight))
    assert list(found.plans.values()) == [plan]
    assert not backend.failed
