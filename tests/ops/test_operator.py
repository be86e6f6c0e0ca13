"""What is made of an operator's declaration."""

import pytest
import torch
from torch import Tensor

from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Inputs, Size
from deit_fast.ops.operator import OPERATORS, BackwardOperator, Operator

SIZE = Size.of_model(64, 2, 32, 8, 10, batch=4)
FORWARD = [name for name, operator in OPERATORS.items() if not isinstance(operator, BackwardOperator)]


def test_an_argument_that_does_not_say_what_it_is_is_an_error_at_import():
    class Undeclared(Operator):
        name = "undeclared"
        launcher = staticmethod(lambda x, weight: x)

        @staticmethod
        def stock(x: PerSample, weight: Tensor) -> Tensor:
            return x * weight

    with pytest.raises(TypeError, match=r"deit_fast\.undeclared: weight must be declared PerSample or Shared"):
        Undeclared()
    assert "undeclared" not in OPERATORS and not hasattr(torch.ops.deit_fast, "undeclared")


def test_an_operator_without_a_launcher_is_an_error_at_import():
    class Unlaunched(Operator):
        name = "unlaunched"

        @staticmethod
        def stock(x: PerSample) -> Tensor:
            return x

    with pytest.raises(TypeError, match="Unlaunched declares no launcher"):
        Unlaunched()


@pytest.mark.parametrize("declared", ["saves", "casts", "data"])
def test_a_name_that_is_no_argument_is_an_error_at_import(declared):
    class Misnamed(Operator):
        name = "misnamed"
        launcher = staticmethod(lambda x, weight: x)

        @staticmethod
        def stock(x: PerSample, weight: Shared) -> Tensor:
            return x * weight

    setattr(Misnamed, declared, ("wieght",))
    with pytest.raises(TypeError, match=r"deit_fast\.misnamed has no arguments \['wieght'\]"):
        Misnamed()


@pytest.mark.parametrize("name", FORWARD)
def test_its_examples_are_all_its_arguments_and_their_outputs_are_as_described(name):
    operator = OPERATORS[name]
    for example in operator.examples(SIZE, Inputs(SIZE, torch.float32, torch.device("cpu"))):
        a = operator.Arguments(**example.arguments)
        operator.check(a)
        found, described = operator.stock(*a), operator.fake(a)
        pairs = [(found, described)] if isinstance(found, Tensor) else zip(found, described, strict=True)
        for mine, empty in pairs:
            assert (mine.shape, mine.dtype) == (empty.shape, empty.dtype)
