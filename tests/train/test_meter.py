"""What the log says of a stretch of steps."""

import time
from types import SimpleNamespace

import pytest
import torch

from deit_fast.train.meter import Meter

accelerate = pytest.importorskip("accelerate")


def test_a_reading_is_of_the_steps_since_the_last():
    teacher = SimpleNamespace(seconds=5.0)
    meter = Meter(8, accelerate.Accelerator(cpu=True), teacher)

    def slow():
        for batch in range(4):
            time.sleep(0.02)
            yield batch

    assert list(meter.waiting(slow(), 2)) == [(0, 1), (2, 3)]
    teacher.seconds += 0.04
    time.sleep(0.02)
    for loss in (1.0, 3.0):
        meter.add(torch.tensor([loss, 0.5]))
    record = meter.read(steps_left=10)
    assert (record["loss"], record["accuracy"]) == (2.0, 0.5)
    seconds = 2 * 8 / record["images_per_second"]
    assert record["seconds_left"] == pytest.approx(5 * seconds)
    assert record["waiting_for_teacher"] == pytest.approx(0.04 / seconds)
    assert 0.08 / seconds <= record["waiting_for_data"] < 1

    meter.add(torch.tensor([7.0, 1.0]))
    record = meter.read(steps_left=0)
    assert (record["loss"], record["waiting_for_data"], record["waiting_for_teacher"]) == (7.0, 0.0, 0.0)
