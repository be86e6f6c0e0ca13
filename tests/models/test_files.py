import os

import pytest

from deit_fast.models.files import whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_and_a_folder_take_the_place_of_old_ones(tmp_path):
    for number in ("1", "2"):
        with whole(tmp_path / "file") as place:
            place.write_text(number)
            assert (tmp_path / "file").exists() == (number == "2")
        with whole(tmp_path / "below" / "folder") as place:
            place.mkdir()
            (place / number).touch()
    assert (tmp_path / "file").read_text() == "2" and names(tmp_path / "below" / "folder") == ["2"]
    assert names(tmp_path) == ["below", "file"] and names(tmp_path / "below") == ["folder"]


def test_what_fails_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="file could not be written: No space left"), whole(tmp_path / "file") as place:
        place.write_text("new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
