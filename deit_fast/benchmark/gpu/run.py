"""The steps in turn, each in a process of its own, until the time is over; every result is written before the next."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from deit_fast.benchmark.gpu import steps
from deit_fast.benchmark.gpu.record import Record, RecordEntry
from deit_fast.benchmark.gpu.steps import Scope, Step, Task, perform
from deit_fast.check.workers import Done, run_tasks


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
    of = tuple(of)
    try:
        for step in of:
            if step.again and not any(_to_do(each, what, device, record) for each in of if not each.again):
                continue
            if step.again:
                record.entries = [entry for entry in record.entries if entry.step != step.name]

            def left(step: Step = step) -> float:
                return min(step.seconds, ends - clock())

            for done in run_tasks(perform, _to_do(step, what, device, record), seconds=left):
                # What the end of the time has cut off has not failed: another call does it.
                if done.failure is not None and clock() >= ends:
                    break
                entry = _entry(done)
                record.entries.append(entry)
                record.write(folder)
                say(f"{entry.step}: {entry.name}: {entry.failure or 'done'} ({entry.seconds:.1f} s)")
    finally:
        record.not_reached = {step.name: missed for step in of if (missed := _missed(step, what, device, record))}
        record.write(folder)


def _to_do(step: Step, what: Scope, device: torch.device, record: Record) -> list[Task]:
    return [task for task in step.tasks(what, device, record) if not record.has(task.step, task.name)]


def _missed(step: Step, what: Scope, device: torch.device, record: Record) -> list[str]:
    """Names; of a step whose tasks another one has to find first, that."""
    if not step.tasks(what, device, record):
        return ["all of it"]
    return [task.name for task in _to_do(step, what, device, record)]


def _entry(done: Done) -> RecordEntry:
    task: Task = done.task
    if done.failure is None:
        return RecordEntry(task.step, task.name, done.seconds, done.result)
    return RecordEntry(task.step, task.name, done.seconds, None, done.failure, done.result.printed)
