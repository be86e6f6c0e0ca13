"""Checkpoints: whole or not there, as many as are kept, and never a file that runs code."""

import os
import pickle

import pytest
import timm
import torch

from deit_fast.train import checkpoints
from deit_fast.train.checkpoints import STATE, WEIGHTS, Checkpoints, Saved

CONFIG = {"input_size": (3, 32, 32), "crop_pct": 1.0}


@pytest.fixture
def model():
    return timm.create_model("test_vit", num_classes=3, img_size=32)


@pytest.fixture
def kept(tmp_path):
    return Checkpoints(tmp_path, keep=2)


def save(kept, model, step, best=None, ema=None):
    kept.save(step, model, ema, CONFIG, {"step": step}, best)


def test_the_last_and_the_best_are_kept(kept, model):
    for step in range(1, 6):
        save(kept, model, step, best=2)
    assert kept.steps() == [2, 4, 5]
    assert (kept.folder / "best").resolve() == kept.path(2).resolve()
    save(kept, model, 6, best=6)
    assert kept.steps() == [5, 6] and (kept.folder / "best").resolve() == kept.path(6).resolve()


def test_what_is_saved_comes_back_and_timm_loads_it(kept, model):
    save(kept, model, 3, ema=model)
    saved = kept.latest()
    assert saved.state == {"step": 3} and saved.ema.keys() == saved.weights.keys()
    for folder in (kept.path(3), kept.path(3) / "ema"):
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        assert again.pretrained_cfg["input_size"] == (3, 32, 32) and again.num_classes == 3


def test_what_is_amended_is_in_the_state_and_the_weights_are_not_written_again(kept, model, monkeypatch):
    kept.save(3, model, None, CONFIG, {"step": 3, "best": None}, best=None)
    before = (kept.path(3) / WEIGHTS).stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match=r"could not be written: .*space"):
            kept.amend(3, {"best": [0.5, 3]}, best=3)
    assert kept.latest().state == {"step": 3, "best": None}
    kept.amend(3, {"best": [0.5, 3]}, best=3)
    assert kept.latest().state == {"step": 3, "best": [0.5, 3]} and (kept.folder / "best").resolve() == kept.path(3)
    assert (kept.path(3) / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.parametrize("full", ["save_for_hf", "fsync", "torch.save"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_what_was_there(kept, model, monkeypatch, full, error):
    save(kept, model, 1)

    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        target = {"torch.save": torch, "fsync": os}.get(full, checkpoints)
        patch.setattr(target, full.removeprefix("torch."), fails)
        with pytest.raises(OSError, match=r"step-00000002 could not be written: .*(space|write)"):
            save(kept, model, 2)
    assert [path.name for path in kept.folder.iterdir()] == ["step-00000001"] and kept.latest().state == {"step": 1}
    save(kept, model, 2)
    assert kept.steps() == [1, 2]


def test_what_was_half_written_is_no_checkpoint_and_is_written_over(kept, model):
    save(kept, model, 1)
    half = kept.path(2).with_suffix(checkpoints.PARTIAL)
    half.mkdir()
    (half / "left").touch()
    assert kept.latest().state == {"step": 1}
    save(kept, model, 2)
    assert kept.steps() == [1, 2] and not (kept.path(2) / "left").exists()


@pytest.mark.parametrize("file", [WEIGHTS, STATE])
def test_a_checkpoint_that_is_cut_short_is_set_aside_for_the_one_before(kept, model, file):
    for step in (1, 2):
        save(kept, model, step)
    os.truncate(kept.path(2) / file, 100)
    with pytest.warns(UserWarning, match="no checkpoint that can be resumed"):
        assert kept.latest().state == {"step": 1}
    assert kept.steps() == [1] and kept.path(2).with_suffix(checkpoints.UNREADABLE).exists()


def test_a_state_that_asks_for_trust_is_refused(kept, model, tmp_path):
    save(kept, model, 1)

    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (kept.path(1) / STATE).write_bytes(pickle.dumps(Runs(), protocol=2))
    with pytest.raises(ValueError, match="no checkpoint that can be resumed"):
        Saved(kept.path(1))
    torch.save({"step": Runs()}, kept.path(1) / STATE)
    with pytest.raises(ValueError, match="no checkpoint that can be resumed"):
        Saved(kept.path(1))
    assert not (tmp_path / "ran").exists()
