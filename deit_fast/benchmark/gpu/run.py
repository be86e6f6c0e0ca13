"""The steps in turn, each in a process of its own, until the time is over; every result is written before the next."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from deit_fast.benchmark.gpu import steps
from deit_fast.benchmark.gpu.record import Entry, Record
from deit_fast.benchmark.gpu.steps import Scope, Step, Task, perform
from deit_fast.benchmark.workers import Done, run_tasks


def run(
    record: Record,
    what: Scope,
    device: torch.device,
    seconds: float,
    folder: Path,
    say: Callable[[str], None],
    of: Iterable[Step] = steps.STEPS,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Does what `record` does not have yet, and writes it to `folder` after every task.

    A task that fails, crashes or hangs is one entry of the record; what the time does not suffice for is named in
    `record.not_reached`. say: gets a line for each task.
    """
    ends = clock() + seconds
    # Tuned settings of this run, to be committed from there; what the user has tuned stays out of it.
    os.environ["DEIT_FAST_TUNED"] = str(folder / "tuned")
    record.not_reached = {}
    for step in of:
        tasks = [task for task in step.tasks(what, device, record) if not record.has(task.step, task.name)]

        def left(step: Step = step) -> float:
            return min(step.seconds, ends - clock())

        for done in run_tasks(perform, tasks, seconds=left):
            entry = _entry(done)
            record.entries.append(entry)
            record.write(folder)
            say(f"{entry.step}: {entry.name}: {entry.failure or 'done'} ({entry.seconds:.1f} s)")
        missed = [task.name for task in tasks if not record.has(task.step, task.name)]
        if missed:
            record.not_reached[step.name] = missed
    record.write(folder)


def _entry(done: Done) -> Entry:
    task: Task = done.task
    if done.failure is None:
        return Entry(task.step, task.name, done.seconds, done.result)
    return Entry(task.step, task.name, done.seconds, None, done.failure, done.result.printed)
