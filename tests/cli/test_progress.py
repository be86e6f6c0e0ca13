"""Progress on a terminal is a bar; in a file or a pipe it is a few lines."""

import io

import pytest
from rich.console import Console

from deit_fast.cli.progress import bar, progress_bars


@pytest.mark.parametrize(("steps", "lines"), [(200, [50, 100, 150]), (6, [2, 4]), (1, [])])
def test_a_pipe_gets_a_line_now_and_then(steps, lines):
    console = Console(file=io.StringIO(), width=100)
    with progress_bars(console) as progress:
        update = bar(progress, "student")
        for step in range(1, steps + 1):
            update(step, steps, f"loss {step}")
    text = console.file.getvalue()
    assert [line for line in text.splitlines() if " of " in line] == [
        f"student: {step} of {steps} loss {step}" for step in lines
    ]
    assert f"{steps}/{steps}" in text


def test_a_terminal_gets_the_bar_alone():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with progress_bars(console) as progress:
        update = bar(progress, "student")
        for step in range(1, 5):
            update(step, 4, "")
    assert " of " not in console.file.getvalue() and "4/4" in console.file.getvalue()
