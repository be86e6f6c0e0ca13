"""Progress bars for a terminal, and now and then a line where output goes to a file or a pipe."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINES = 4


def progress_bars(console: "Console") -> "Progress":
    """A line for each task: its name, steps, a note, time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    name, note = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    return Progress(name, BarColumn(), MofNCompleteColumn(), note, TimeElapsedColumn(), console=console)


def bar(progress: "Progress", name: str) -> Callable[..., None]:
    """A new bar; call it with the step, from 1, the number of steps, and a note."""
    task = progress.add_task(name, total=None, note="")

    def update(step: int, steps: int, note: str = "") -> None:
        progress.update(task, completed=step, total=steps, note=note)
        # There a bar shows only once it is finished.
        if not progress.console.is_terminal and step % -(-steps // LINES) == 0 and step < steps:
            progress.console.print(f"{name}: {step} of {steps} {note}".rstrip())

    return update
