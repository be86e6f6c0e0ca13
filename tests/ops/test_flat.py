"""Arguments laid flat, and gathered again."""

import pytest
import torch
from torch import Tensor

from deit_fast.ops.arguments import PerSample, Shared, declared
from deit_fast.ops.examples import Inputs, Size
from deit_fast.ops.flat import flattening, layout
from deit_fast.ops.operator import OPERATORS, BackwardOperator

SIZE = Size.of_model(64, 2, 32, 8, 10, batch=4)
FORWARD = [name for name, operator in OPERATORS.items() if not isinstance(operator, BackwardOperator)]


def stock(
    x: PerSample, eps: float, weights: list[Shared], scale: Shared | None, flags: list[bool], kept: Shared | None
) -> Tensor: ...


ARGUMENTS = declared("example", stock)
FLAT = ("x", 1e-6, "w0", "w1", None, [True], "kept")


def laid_out():
    return layout(ARGUMENTS, (2,), saves=("x", "weights"), data=("kept",), make=list)


def test_the_tensors_of_a_list_stand_in_its_place():
    assert flattening(ARGUMENTS)("x", 1e-6, ["w0", "w1"], None, [True], "kept") == ((2,), FLAT)


def test_gathering_flat_arguments_gives_the_list_again():
    assert laid_out().gather(*FLAT) == ("x", 1e-6, ["w0", "w1"], None, [True], "kept")


def test_what_was_saved_and_the_numbers_are_put_back_in_place_and_the_rest_is_none():
    made = laid_out()
    saved, numbers = made.saved(*FLAT), made.numbers(*FLAT)
    assert (saved, numbers) == (("x", "w0", "w1"), (1e-6, [True]))
    assert made.saved_count == len(saved)
    assert made.restored(*saved, *numbers) == ["x", 1e-6, ["w0", "w1"], None, [True], None]


def test_flags_and_gradients_are_those_of_the_tensors_that_are_no_data():
    made = laid_out()
    assert made.needs("layout", "x", "eps", "w0", "w1", "scale", "flags", "kept") == ("x", "w0", "w1", "scale")
    assert made.gradients("dx", "dw0", "dw1", "dscale") == (None, "dx", None, "dw0", "dw1", "dscale", None, None)
    assert made.gradients_count == 4


@pytest.mark.parametrize("name", FORWARD)
def test_each_operators_flat_arguments_are_gathered_to_what_they_were(name):
    operator = OPERATORS[name]
    for example in operator.examples(SIZE, Inputs(SIZE, torch.float32, torch.device("cpu"))):
        args = tuple(operator.Arguments(**example.arguments))
        made, flat = operator.flatten(*args)
        again = made.gather(*flat)
        assert not any(isinstance(each, list) and each and isinstance(each[0], Tensor) for each in flat)
        assert len(again) == len(args)
        for mine, given in zip(again, args, strict=True):
            assert mine is given or (list(map(id, mine)) == list(map(id, given)))
