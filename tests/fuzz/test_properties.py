"""A fixed set of drawn cases of every operator; `make fuzz` draws others, for as long as it is told to."""

import pytest
from hypothesis import given, settings

from tests.fuzz.properties import PROPERTIES

# What the whole suite has time for.
CASES = 3


@pytest.mark.parametrize("op", PROPERTIES)
def test_whatever_is_drawn(op):
    cases, check = PROPERTIES[op]
    settings(max_examples=CASES, derandomize=True, database=None, deadline=None)(given(cases)(check))()
