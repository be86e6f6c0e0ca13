"""The students of `deit-fast demo` begin alike, and are what their recipe says."""

import pytest
import torch

import deit_fast
from deit_fast.train import digits, students

pytest.importorskip("timm")
pytest.importorskip("sklearn")


def test_both_students_start_alike_and_one_is_swapped(tmp_path, monkeypatch):
    digits.write_folder(tmp_path / "digits", most=64)
    students.train_teacher(tmp_path / "digits", tmp_path / "teacher", lambda *_: None, cpu=True)
    started = []
    monkeypatch.setattr(students, "_train", lambda run, on_step: started.append(run.model))
    for swapped in (False, True):
        out = tmp_path / str(swapped)
        students.train_student(tmp_path / "digits", out, tmp_path / "teacher", lambda *_: None, True, swapped)
    stock, swapped = started
    assert deit_fast.report(swapped).calls and not deit_fast.report(stock).calls
    assert all(torch.equal(tensor, swapped.state_dict()[name]) for name, tensor in stock.state_dict().items())
    assert stock.pos_embed.std() > 0.3
