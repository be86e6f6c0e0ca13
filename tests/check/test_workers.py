"""Tasks in processes of their own: each ends as it may, and the others are done."""

import pytest

from deit_fast.check.workers import Failed, run_tasks
from tests.check.worker_tasks import act


def run(*tasks: str, seconds=lambda: 60.0) -> list:
    told = []
    done = list(run_tasks(act, tasks, lambda task, words: told.append((task, words)), seconds))
    assert [each.task for each in done] == list(tasks)[: len(done)]
    assert told == [(task, f"begins: {task}") for task in tasks]
    return [each.result for each in done]


def test_tasks_share_a_process_and_an_exception_ends_its_task_alone():
    first, failed, last = run("one", "raise", "two")
    assert failed.reason == "ValueError: no such shape … and more"
    assert "about to raise" in failed.printed and "Traceback" in failed.printed
    assert first[0] == "one" and last[0] == "two" and first[1] == last[1]


@pytest.mark.parametrize(
    ("ending", "reason", "printed"),
    [
        ("crash", "its process ended: killed by SIGSEGV", "about to crash"),
        ("exit", "its process ended: exit code 3", ""),
        ("lose the device", "RuntimeError: CUDA error: an illegal memory access was encountered", "Traceback"),
    ],
)
def test_what_ends_a_process_ends_its_task_alone(ending, reason, printed):
    first, failed, last = run("one", ending, "two")
    assert isinstance(failed, Failed) and failed.reason == reason and printed in failed.printed
    assert last[0] == "two" and first[1] != last[1]


def test_a_task_that_takes_too_long_is_ended():
    # Asked before a process starts, and twice a task.
    left = iter([60.0, 60.0, 60.0, 60.0, 0.5, 60.0, 60.0, 60.0])
    first, failed, last = run("one", "hang", "two", seconds=lambda: next(left))
    assert failed.reason == "took longer than 0.5 s" and "about to hang" in failed.printed
    assert last[0] == "two" and first[1] != last[1]


def test_no_task_begins_after_the_time_is_over():
    left = iter([60.0, 60.0, 60.0, 0.0, 0.0])
    told = []
    done = list(run_tasks(act, ["one", "two"], lambda task, words: told.append(task), lambda: next(left)))
    assert [each.task for each in done] == told == ["one"]
