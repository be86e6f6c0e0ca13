"""`make sanitize` runs these, apart from the other tests: those run in Triton's interpreter, chosen at its import."""

import pytest
import torch

torch.set_num_threads(1)


# The long tables.
TABLES = ("test_operator", "test_no_pass_changes_the_kernel")


def pytest_addoption(parser: pytest.Parser) -> None:
    # An N that divides by 2 or 3 would leave out whole dtypes, layouts and targets, which come by turns.
    parser.addoption("--every", type=int, default=1, metavar="N", help="run only every Nth case of the long tables")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tables = [item for item in items if item.originalname in TABLES]
    left_out = set(tables) - set(tables[:: config.getoption("every")])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
