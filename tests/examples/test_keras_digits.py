"""examples/keras_digits.py runs to its end, and learns."""

import re
import runpy
import sys

import pytest

pytest.importorskip("deit_fast.keras", exc_type=ImportError)  # before keras, which it puts on PyTorch
pytest.importorskip("sklearn")


def test_a_few_steps_are_better_than_guessing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["keras_digits.py", "--steps", "120"])
    runpy.run_path("examples/keras_digits.py", run_name="__main__")
    [loss] = re.findall(r"450 other digits: .* % right, loss ([\d.]+)", capsys.readouterr().out)
    assert float(loss) < 2.2  # guessing has 2.3
