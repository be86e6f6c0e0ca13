"""A run's checkpoints: folders that appear whole or not at all, each one that timm loads by `local-dir:`."""

import errno
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from torch import nn

from deit_fast.models.checkpoint import WEIGHTS
from deit_fast.models.files import PARTIAL, whole

STATE, AMENDED, EMA = "state.pt", "amended.json", "ema"
UNREADABLE = ".unreadable"
_NAME = re.compile(r"step-(\d+)")


class Saved:
    """What a checkpoint holds beside the weights. state: of tensors and plain values, as it was given to `save`."""

    def __init__(self, folder: Path):
        """Read it whole.

        Raises:
            ValueError: it is broken, or asks for more trust than tensors need.
            OSError: it can't be read now.
        """
        self.folder = folder
        try:
            self.weights = load_file(folder / WEIGHTS)
            self.ema = load_file(folder / EMA / WEIGHTS) if (folder / EMA).exists() else None
            self.state: dict[str, Any] = torch.load(folder / STATE, map_location="cpu", weights_only=True)
            if (folder / AMENDED).exists():
                self.state |= json.loads((folder / AMENDED).read_text())
        except Exception as error:  # nearly anything for a broken file
            if isinstance(error, MemoryError) or getattr(error, "errno", None) not in (None, errno.ENOENT):
                raise
            raise ValueError(f"{folder} is no checkpoint that can be resumed: {error}") from error


class Checkpoints:
    """The folders `step-<n>` below `folder`: the last `keep` and the best one, which `best` links to."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Of the checkpoints there are, in order."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*"))
        return sorted(int(name[1]) for name in names if name)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def latest(self) -> Saved | None:
        """The newest that is whole; a broken one is set aside, and a warning says so.

        Raises:
            ValueError: all are broken.
        """
        for partial in self.folder.glob(f"step-*{PARTIAL}"):  # of a killed run
            shutil.rmtree(partial, ignore_errors=True)
        for step in reversed(self.steps()):
            try:
                return Saved(self.path(step))
            except ValueError as error:
                if step == self.steps()[0]:
                    raise ValueError(f"{error}; none is left before it. Another output folder begins anew") from error
                aside = self.path(step).with_suffix(UNREADABLE)
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)
                warnings.warn(f"{error}; it is now {aside}", stacklevel=2)
        return None

    def save(
        self,
        step: int,
        model: nn.Module,
        ema: nn.Module | None,
        data_config: dict[str, Any],
        state: dict[str, Any],
        best: int | None,
    ) -> None:
        """Write a checkpoint; then remove those no longer kept.

        data_config: how images are prepared for the model, for timm's config.json.
        best: the step of the best one so far, kept beside the last.

        Raises:
            OSError: it can't be written, say to a full disk; those before are as they were.
        """
        with whole(self.path(step)) as folder:
            folder.mkdir()
            save_for_hf(model, str(folder), safe_serialization=True, data_config=data_config)
            if ema is not None:
                save_for_hf(ema, str(folder / EMA), safe_serialization=True, data_config=data_config)
            torch.save(state, folder / STATE)
        self._link_best(best)
        self._remove_old(best)

    def amend(self, step: int, state: dict[str, Any], best: int | None) -> None:
        """Replace values of a checkpoint's state, by ones that JSON has; the rest as `save`.

        Raises:
            OSError: it can't be written; the state is as it was.
        """
        self._link_best(best)  # first: a kill in between leaves the state of before
        with whole(self.path(step) / AMENDED) as file:
            file.write_text(json.dumps(state))
        self._remove_old(best)

    def _remove_old(self, best: int | None) -> None:
        for old in self.steps()[: -self.keep]:
            if old != best:
                shutil.rmtree(self.path(old))

    def _link_best(self, step: int | None) -> None:
        if step is None:
            return
        link = self.folder / f"best{PARTIAL}"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path(step).name)
        link.replace(self.folder / "best")


def check_same(folder: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """What identifies a run.

    Raises:
        ValueError: what is in `folder` is of another.
    """
    for name, value in now.items():
        if was.get(name) != value:
            raise ValueError(f"{folder} is of another run: its {name} was {was.get(name)}, now it is {value}")
