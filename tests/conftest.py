"""Runs every kernel of the test suite in Triton's interpreter, on CPU tensors."""

import os
import sys

# Read when triton is imported, so set before anything here imports it.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("DEIT_FAST_BACKEND", None)
# Whatever was tuned on this machine: tests see the shipped settings.
os.environ["DEIT_FAST_TUNED"] = os.path.join(os.path.dirname(__file__), "no-such-folder")

from collections.abc import Iterator

import pytest
import torch

from tests.support import bf16_interpreter, older_interpreter, quick_interpreter

# `make sanitize`: not in the interpreter.
collect_ignore = ["sanitize"]

torch.set_num_threads(1)
older_interpreter.install()
bf16_interpreter.install()
quick_interpreter.install()


def pytest_configure(config: pytest.Config) -> None:
    # Overflow, NaN and infinity are among the inputs; numpy's remarks about them are not news.
    for module in ("triton.runtime.interpreter", "tests.support.bf16_interpreter", "numpy._core.fromnumeric"):
        config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{module}")


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_is_remembered() -> Iterator[None]:
    """What failed in one test is tried anew, and warned of, in the next; no report tells of an earlier test."""
    yield
    backend = sys.modules.get("deit_fast.ops.backend")
    if backend is not None:
        backend.failed.clear()
        backend._warned.clear()
        backend.by_vendor.clear()


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """The operators run their Triton kernels, in the interpreter, also on CPU tensors."""
    from deit_fast.ops import backend

    with backend.forced("triton"):
        yield
