import pytest

from deit_fast.kernels.linear import settings


@pytest.mark.parametrize(
    ("tiles", "rows", "splits"), [(36, 6336, 2), (3, 6336, 4), (3, 50688, 16), (500, 10**6, 1), (1, 10, 1)]
)
def test_splits_fill_the_device_once_with_a_thousand_rows_each(tiles, rows, splits):
    assert settings.splits(tiles, rows, 108) == splits
