"""The numbers by which a result is right; `tests/test_support_accuracy.py` has what they let pass."""

import pytest
import torch

from deit_fast.check.accuracy import WRONG_FACTOR, WRONG_FLOOR, refuse_wrong, relative_error

EXACT = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_an_error_is_relative_to_the_whole_or_to_the_least_that_counts():
    off = torch.tensor([3.0, 4.5])
    assert relative_error(off, EXACT) == 0.1
    assert relative_error(off, EXACT, least=10.0) == 0.05
    assert relative_error(EXACT, EXACT) == relative_error(0 * EXACT, 0 * EXACT) == 0.0


def test_nan_is_no_small_error():
    for found, exact in ((torch.nan * EXACT, EXACT), (EXACT, torch.nan * EXACT)):
        error = relative_error(found, exact)
        with pytest.raises(ArithmeticError, match="wrong: error nan"):
            refuse_wrong(error, 1.0, torch.float32, "model")


@pytest.mark.parametrize("dtype", WRONG_FLOOR)
def test_what_is_wrong_is_refused_and_rounding_is_not(dtype):
    refuse_wrong(WRONG_FLOOR[dtype], 0.0, dtype, "model")
    refuse_wrong(WRONG_FACTOR * 0.1, 0.1, dtype, "model")
    with pytest.raises(ArithmeticError, match=r"wrong: error 5.0e-01 against float64, the stock model's is 1.0e-01"):
        refuse_wrong(0.5, 0.1, dtype, "model")
