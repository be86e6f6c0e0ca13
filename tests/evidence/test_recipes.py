"""The work that drop path and readout leave out of the recipes' training steps."""

import pytest

from evidence.recipes import RECIPES, work


@pytest.mark.parametrize(
    ("name", "batch", "rate", "ratio"),
    [("small", 32, 0.05, 0.89), ("3-large", 8, 0.45, 0.56), ("3-huge", 4, 0.6, 0.43)],
)
def test_a_recipe_computes_no_more_than_promised(name, batch, rate, ratio):
    found = work(RECIPES[name], batch)
    assert found.kept == pytest.approx(1 - rate, abs=0.02)
    assert found.ratio <= ratio
    assert found.without_drop_path < found.stock
