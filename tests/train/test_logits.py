"""What a cache of logits gives back, and what of it is believed."""

import json

import pytest
import torch

from deit_fast.train import logits
from deit_fast.train.logits import Logits

CPU = torch.device("cpu")


def cache(folder, hard=False, **identity) -> Logits:
    return Logits(folder, {"seed": 0, "scale": (0.1, 1.0)} | identity, classes=5, hard=hard)


def test_what_is_written_is_read_bit_for_bit(tmp_path):
    put = {(epoch, step, part): torch.randn(2, 5) for epoch in (0, 1) for step in (0, 7) for part in (0, 3)}
    writing = cache(tmp_path)
    for key, values in put.items():
        assert writing.get(key, CPU) is None
        writing.put(key, values)
    writing.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0000", "epoch-0001", "identity.json"]
    reading = cache(tmp_path)
    assert all(torch.equal(reading.get(key, CPU), values) for key, values in put.items())
    assert reading.get((1, 1, 0), CPU) is None and reading.get((2, 0, 0), CPU) is None


def test_each_process_writes_its_parts_of_an_epoch(tmp_path):
    processes = [cache(tmp_path), cache(tmp_path)]
    for part, process in enumerate(processes):
        assert process.get((0, 0, part), CPU) is None
        process.put((0, 0, part), torch.full((2, 5), float(part)))
    for process in processes:
        process.flush()
    reading = cache(tmp_path)
    assert [reading.get((0, 0, part), CPU)[0, 0].item() for part in (0, 1)] == [0, 1]


def test_hard_distillation_keeps_the_likeliest_class_alone(tmp_path):
    writing, values = cache(tmp_path, hard=True), torch.randn(3, 5)
    writing.get((0, 0, 0), CPU)
    writing.put((0, 0, 0), values)
    writing.flush()
    read = cache(tmp_path, hard=True).get((0, 0, 0), CPU)
    assert torch.equal(read.argmax(-1), values.argmax(-1)) and read.shape == values.shape


def test_a_shard_is_written_when_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "SHARD_BYTES", 2 * 5 * 4)
    writing = cache(tmp_path)
    writing.get((0, 0, 0), CPU)
    for step in range(4):
        writing.put((0, step, 0), torch.zeros(1, 5))
    assert sorted(path.name for path in (tmp_path / "epoch-0000").iterdir()) == ["0.0.safetensors", "2.0.safetensors"]


def test_half_a_shard_is_not_believed_and_a_full_disk_stops_nothing(tmp_path, monkeypatch):
    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    writing = cache(tmp_path)
    writing.get((0, 0, 0), CPU)
    writing.put((0, 0, 0), torch.zeros(1, 5))
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left on device; training goes on"):
        patch.setattr(logits, "save_file", full)
        writing.flush()
    (tmp_path / "epoch-0000" / "0.0.safetensors.partial").write_bytes(b"half")  # of a killed process
    assert cache(tmp_path).get((0, 0, 0), CPU) is None


def test_a_cache_of_something_else_is_refused(tmp_path):
    cache(tmp_path)
    cache(tmp_path)
    with pytest.raises(ValueError, match="is of another run: its seed was 0, now it is 1"):
        cache(tmp_path, seed=1)
    assert json.loads((tmp_path / "identity.json").read_text()) == {"seed": 0, "scale": [0.1, 1.0]}
    (tmp_path / "epoch-0000").mkdir()
    (tmp_path / "epoch-0000" / "0.0.safetensors").write_bytes(b"something else")
    with pytest.raises(OSError, match=r"0\.0\.safetensors can't be read"):
        cache(tmp_path).get((0, 0, 0), CPU)
