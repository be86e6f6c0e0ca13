"""What a stretch of training steps came to, and where its time went."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from deit_fast.train.teaching import Teacher


class Meter:
    """Sums from one reading to the next. batch_size: of a step, over all processes."""

    def __init__(self, batch_size: int, accelerator: Accelerator, teacher: Teacher | None):
        self.batch_size, self.accelerator, self.teacher = batch_size, accelerator, teacher
        self.sums = torch.zeros(2, device=accelerator.device)
        self._restart()

    def _restart(self) -> None:
        self.sums.zero_()
        self.steps, self.waited = 0, 0.0
        self.start, self.taught = time.perf_counter(), self._taught()

    def _taught(self) -> float:
        return self.teacher.seconds if self.teacher is not None else 0.0

    def waiting(self, loader: Iterable[tuple[Any, Any]], parts: int) -> Iterator[tuple[Any, ...]]:
        """The batches, `parts` at a time; waiting for them is counted."""
        batches = zip(*[iter(loader)] * parts, strict=True)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, seen: Tensor) -> None:
        """seen: loss and accuracy of a step, on the device, where they stay until they are read."""
        self.sums += seen
        self.steps += 1

    def read(self, steps_left: int) -> dict[str, float]:
        """What the log has of the steps since the last reading, of all processes; waits for the device."""
        loss, accuracy = (self.accelerator.reduce(self.sums, "mean") / self.steps).tolist()
        seconds = time.perf_counter() - self.start
        record = {
            "loss": loss,
            "accuracy": accuracy,
            "images_per_second": self.steps * self.batch_size / seconds,
            "seconds_left": seconds / self.steps * steps_left,
            "waiting_for_data": self.waited / seconds,
            "waiting_for_teacher": (self._taught() - self.taught) / seconds,
        }
        self._restart()
        return record
