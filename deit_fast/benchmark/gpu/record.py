"""What was done, in results.json: written whole after every task, read by the run that goes on."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deit_fast.benchmark.files import write_whole

VERSION = 1


@dataclass
class RecordEntry:
    """One task's end. result: JSON, or None where it failed; printed: the end of what it printed then."""

    step: str
    name: str
    seconds: float
    result: Any = None
    failure: str | None = None
    printed: str = ""


@dataclass
class Record:
    """environment: whose results these are. not_reached: by step, the tasks that the time did not suffice for."""

    environment: dict[str, str]
    entries: list[RecordEntry] = field(default_factory=list)
    not_reached: dict[str, list[str]] = field(default_factory=dict)

    def result(self, step: str, name: str) -> Any:
        """None where there is none."""
        return next((each.result for each in self.entries if (each.step, each.name) == (step, name)), None)

    def has(self, step: str, name: str) -> bool:
        return any((each.step, each.name) == (step, name) for each in self.entries)

    def of(self, step: str) -> list[RecordEntry]:
        return [each for each in self.entries if each.step == step]

    def write(self, folder: Path) -> None:
        """On the disk before it returns, whole or not at all."""
        content = {
            "version": VERSION,
            "environment": self.environment,
            "not_reached": self.not_reached,
            "entries": [vars(each) for each in self.entries],
        }
        write_whole(folder / "results.json", json.dumps(content, indent=1, default=str) + "\n")

    @staticmethod
    def read(file: Path) -> "Record":
        """
        Raises:
            ValueError: `file` is not what `write` writes.
        """
        try:
            content = json.loads(file.read_text())
            if content["version"] != VERSION:
                raise ValueError(f"its version is {content['version']}, this deit_fast reads {VERSION}")
            entries = [RecordEntry(**each) for each in content["entries"]]
            return Record(content["environment"], entries, content["not_reached"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{file} holds no results of deit-fast gpu: {type(error).__name__}: {error}") from error
