"""What an operator's launches are remembered by."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from deit_fast.kernels.launching.keys import key_and_pointers

X, WEIGHT = torch.zeros(4, 64), torch.zeros(64, 64)
PLAIN = (X, WEIGHT, 1e-6, "gelu", [True, False], None)


def key_of(*flat):
    return key_and_pointers((1,), flat)[0]


def test_equal_looking_arguments_have_one_key_and_their_own_addresses():
    others = (torch.ones(4, 64), torch.ones(64, 64), *PLAIN[2:])
    key, pointers = key_and_pointers((1,), others)
    assert key == key_of(*PLAIN)
    assert pointers == [tensor.data_ptr() for tensor in others[:2]]


@pytest.mark.parametrize(
    "others",
    {
        "shape": (torch.zeros(5, 64), *PLAIN[1:]),
        "dtype": (X.bfloat16(), *PLAIN[1:]),
        "strides": (torch.zeros(64, 4).T, *PLAIN[1:]),
        "alignment": (torch.zeros(4 * 64 + 1)[1:].view(4, 64), *PLAIN[1:]),
        "number": (*PLAIN[:2], 1e-5, *PLAIN[3:]),
        "flags": (*PLAIN[:4], [True, True], None),
        "absent": (X, None, *PLAIN[2:]),
        "present": (*PLAIN[:5], X.clone()),
    }.items(),
    ids=lambda item: item[0],
)
def test_whatever_a_launcher_may_decide_by_is_in_the_key(others):
    assert key_of(*others[1]) != key_of(*PLAIN)


def test_a_tensor_given_twice_is_another_call_than_two_alike():
    assert key_of(WEIGHT, WEIGHT) != key_of(WEIGHT, WEIGHT.clone())
    assert key_of(X, WEIGHT, X) != key_of(X, WEIGHT, WEIGHT)


def test_the_lengths_of_lists_are_in_the_key():
    assert (
        key_and_pointers((1, 2), (X, X.clone(), X.clone()))[0] != key_and_pointers((2, 1), (X, X.clone(), X.clone()))[0]
    )


def test_a_subclass_of_tensor_has_no_key_and_a_parameter_has():
    class Wrapped(Tensor):
        pass

    assert key_of(X.as_subclass(Wrapped), WEIGHT) is None
    assert key_of(X, Parameter(WEIGHT)) is not None
