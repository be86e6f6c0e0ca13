"""Tasks in a process of their own, so that one that hangs, crashes or breaks the GPU's context ends alone."""

import io
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from deit_fast.ops import backend

_PRINTED = 4000  # characters at the end of what a worker printed
_LAST_WORDS = 5.0  # seconds


@dataclass(frozen=True)
class Failed:
    """A task without a result. reason: one line. printed: the end of its process's output."""

    reason: str
    printed: str = ""


@dataclass(frozen=True)
class Done:
    """A task's result, or why there is none, and the seconds it took."""

    task: Any
    result: Any
    seconds: float

    @property
    def failure(self) -> str | None:
        return self.result.reason if isinstance(self.result, Failed) else None


def make_current(device: torch.device) -> None:
    """Events, graphs and other people's kernels are put on the current GPU's stream: a worker asks for its task's."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


# Tells the other side something while a task is under way.
Tell = Callable[[Any], None]


def run_tasks(
    function: Callable[[Any, Tell], object],
    tasks: Sequence[Any],
    heard: Callable[[Any, Any], None] = lambda task, told: None,
    seconds: Callable[[], float] = lambda: float("inf"),
) -> Iterator[Done]:
    """`function(task, tell)` of each task, in order, in one worker process for as long as that lives.

    A worker that dies, takes longer than a task may or finds its device lost is replaced by a new one for the tasks
    that remain.

    function: of a module's top level; it, its results and what it tells are pickled. heard: called here, with the task
    and what it told, as soon as it does. seconds: how long the next task may take; none begins where that is not
    above 0.
    """
    remaining = list(tasks)
    while remaining and seconds() > 0:
        with _Worker(function) as worker:
            while remaining and seconds() > 0:
                task = remaining.pop(0)
                began = time.monotonic()
                result, lives = worker.call(task, partial(heard, task), began + seconds())
                yield Done(task, result, time.monotonic() - began)
                if not lives:
                    break
            else:
                return


def run_tasks_here(
    function: Callable[[Any, Tell], object],
    tasks: Sequence[Any],
    heard: Callable[[Any, Any], None] = lambda task, told: None,
) -> Iterator[Done]:
    """The same in this process, where no device can be lost; what a task raises goes through."""
    for task in tasks:
        began = time.monotonic()
        result = function(task, partial(heard, task))
        yield Done(task, result, time.monotonic() - began)


class _Worker:
    def __init__(self, function: Callable[[Any, Tell], object]) -> None:
        self.function = function

    def __enter__(self) -> "_Worker":
        # Not a fork: a CUDA context does not survive one.
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        descriptor, name = tempfile.mkstemp(prefix="deit-fast-worker-")
        os.close(descriptor)
        self.output = Path(name)
        self.process = context.Process(target=_serve, args=(theirs, self.function, name), daemon=False)
        self.process.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self.connection.close()
        # Idle, it ends by itself; in the middle of a task it has to be ended.
        self.process.join(timeout=5)
        self._kill()
        self.output.unlink(missing_ok=True)

    def call(self, task: Any, heard: Tell, deadline: float) -> tuple[object, bool]:
        """The result, and whether the worker can go on."""
        began = time.monotonic()
        self.output.write_bytes(b"")
        try:
            self.connection.send(task)
            while self.connection.poll(None if deadline == float("inf") else max(0.0, deadline - time.monotonic())):
                kind, content = self.connection.recv()
                if kind == "result":
                    return content, True
                if kind != "told":
                    return self._failed(content), kind == "failed"
                heard(content)
        except (EOFError, ConnectionError):
            self.process.join()
            return self._failed(f"its process ended: {_how(self.process.exitcode)}"), False
        except KeyboardInterrupt:
            # The worker still tells what it has.
            if self.process.pid is not None:
                os.kill(self.process.pid, signal.SIGINT)
            while self.connection.poll(_LAST_WORDS):
                try:
                    kind, content = self.connection.recv()
                except EOFError:
                    break
                if kind == "told":
                    heard(content)
            raise
        self._kill()
        return self._failed(f"took longer than {deadline - began:.3g} s"), False

    def _failed(self, reason: str) -> Failed:
        return Failed(reason, self.output.read_text(errors="replace")[-_PRINTED:])

    def _kill(self) -> None:
        """The worker and what it has started."""
        with suppress(ProcessLookupError):
            if self.process.pid is not None:
                os.killpg(self.process.pid, signal.SIGKILL)
        # While it still starts it has no group of its own.
        self.process.kill()
        self.process.join()


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(connection: Connection, function: Callable[[Any, Tell], object], output: str) -> None:
    """Answers tasks until there are no more, or the device is lost."""
    os.setsid()
    with open(output, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = ("result", function(task, lambda told: connection.send(("told", told))))
        except Exception as error:
            traceback.print_exc()
            lost = torch.cuda.is_initialized() and backend.device_error(error, torch.device("cuda")) is not None
            answer = ("lost" if lost else "failed", backend.in_a_line(error))
        connection.send(answer)
        if answer[0] == "lost":
            return
