"""The students of `deit-fast demo` begin alike, and are what their configuration says."""

import pytest
import torch

import deit_fast
from deit_fast.train import students

pytest.importorskip("timm")


def test_both_students_start_alike():
    weights = [students.build_student().state_dict() for _ in range(2)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_configuration_describes_the_student():
    described = deit_fast.models.VisionTransformer(students.CONFIG)
    described.load_state_dict(students.build_student().state_dict(), strict=True)
