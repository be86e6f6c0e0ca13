"""What was measured to be fastest on a device, by operator and shape: `deit-fast tune` writes it, operators read it.

A file holds one operator at one shape on one device, which it says; its other keys are batch sizes. Its name is short
whatever the device is called, and has a hash of all three:

    layer_norm_linear,NVIDIA_A100-SXM4-80GB,4bb6af279bfd5b50.json
    {"format": 4, "operator": "layer_norm_linear",
     "shape": "x=198x384bf16,norm_weight,norm_bias,weights=1152x384bf16,biases",
     "device": "NVIDIA A100-SXM4-80GB", "triton": "3.9.0", "driver": "12080",
     "64": {"runs": "triton", "settings": {"gemm(16384, 1152, 384, 2, sm_80, none)": {"rows": 128, …}}},
     "256": {"runs": "stock"}}

Settings are tiles, numbers, or true and false. Files are looked for in the user's folder,
then among those that the package ships. Between the batches that were measured, the nearest one answers, by its ratio.
What was measured with another Triton or driver, is not what its name says, or can't be read, is left alone, and said
once.
"""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import log
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

FORMAT = 4
SHIPPED = Path(__file__).with_name("tuned")
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
# Of a device's name, as far as a file is named by it.
_READABLE = 40
_ABOUT = frozenset({"operator", "shape", "device"})
_enabled = True


class Argument(NamedTuple):
    """What is to be known of an operator's argument.

    tensor: whether it is one, or several; tensors: whether it is a list of them. per_sample: whether it has a row for
    each sample. keyed: whether settings depend on its value, if it is no tensor.
    """

    name: str
    tensor: bool
    tensors: bool
    per_sample: bool
    keyed: bool


class Choice(NamedTuple):
    """stock: the stock PyTorch operators were fastest. settings: what to launch with, by what is asked."""

    stock: bool
    settings: dict[str, object]


def folder() -> Path:
    """Where a user's measurements are: $DEIT_FAST_TUNED, or deit_fast/tuned in the user's cache."""
    given = os.environ.get("DEIT_FAST_TUNED")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given) if given else Path(cache) / "deit_fast" / "tuned"


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Whether, within the block, operators heed what was measured."""
    global _enabled
    previous, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = previous


def is_enabled() -> bool:
    return _enabled


def forget() -> None:
    """Files are read anew."""
    _names.cache_clear()
    _measured.cache_clear()


def is_there() -> bool:
    """Whether anything was measured, and is to be heeded."""
    return _enabled and bool(_names())


def choice(op: str, declared: Sequence[Argument], arguments: tuple, device_name: str, driver: str) -> Choice | None:
    """What was measured for `op` with `arguments`, which are `declared`; None where nothing was."""
    if not is_there():
        return None
    shape, batch = described(declared, arguments)
    found = measured(op, shape, device_name, driver)
    if not found or batch < 1:
        return None
    return found[min(found, key=lambda size: abs(log(size / batch)))]


def measured(op: str, shape: str, device_name: str, driver: str) -> dict[int, Choice]:
    """By batch, what was measured for `op` at this shape (`described`)."""
    file = _names().get(file_name(op, shape, device_name))
    return {} if file is None else _measured(file, op, shape, device_name, driver)


def described(declared: Sequence[Argument], arguments: Sequence[object]) -> tuple[str, int]:
    """An operator's arguments but for the batch, in a line; the batch."""
    batch = 0
    parts = []
    for (name, _, _, per_sample, keyed), argument in zip(declared, arguments, strict=True):
        first = argument[0] if isinstance(argument, (list, tuple)) and argument else argument
        if first is None or not keyed:
            continue
        if isinstance(first, Tensor):
            batch = batch or (first.shape[0] if per_sample and first.ndim else 0)
            sides = first.shape[1:] if per_sample else first.shape
            # Of vectors it is enough that they are there: a weight tells their length.
            size = "x".join(map(str, sides)) + _DTYPES.get(first.dtype, "") if first.ndim > 1 else ""
            if isinstance(argument, (list, tuple)) and len(argument) > 1:
                size = f"{len(argument)}*{size}"
            parts.append(f"{name}={size}" if size else name)
        elif isinstance(first, bool) and isinstance(argument, (list, tuple)):
            parts.append(name + "=" + "".join(str(int(flag)) for flag in argument))
        elif isinstance(first, (int, str)):
            parts.append(f"{name}={argument}")
    return ",".join(parts), batch


def file_name(op: str, shape: str, device_name: str) -> str:
    """Safe on every file system, and below its 255 bytes with room for more."""
    told = hashlib.sha256(json.dumps([op, shape, device_name]).encode()).hexdigest()[:16]
    device = re.sub(r"[^A-Za-z0-9.-]+", "_", device_name)[:_READABLE]
    return f"{op},{device},{told}.json"


def write(op: str, shape: str, device_name: str, driver: str, batch: int, measured: Choice) -> Path:
    """Adds a batch to the user's file, or takes the place of what was measured before.

    Raises:
        OSError: the folder can't be written to.
    """
    folder().mkdir(parents=True, exist_ok=True)
    file = folder() / file_name(op, shape, device_name)
    header = _header(op, shape, device_name, driver)
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        content = {}
    if not isinstance(content, dict) or {name: content.get(name) for name in header} != header:
        content = header
    content[str(batch)] = {"runs": "stock"} if measured.stock else {"runs": "triton", "settings": measured.settings}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, file)
    forget()
    return file


@lru_cache(maxsize=1)
def _names() -> dict[str, Path]:
    """The files there are, the user's before the package's."""
    found: dict[str, Path] = {}
    for place in (folder(), SHIPPED):
        try:
            files = sorted(place.glob("*.json"))
        except OSError:
            continue
        for file in files:
            found.setdefault(file.name, file)
    return found


@lru_cache(maxsize=1024)
def _measured(file: Path, op: str, shape: str, device_name: str, driver: str) -> dict[int, Choice]:
    """By batch; nothing where the file is not to be relied on."""
    now = _header(op, shape, device_name, driver)
    try:
        content = json.loads(file.read_text())
        made = {name: content.pop(name) for name in now}
        measured = {int(batch): _choice(entry) for batch, entry in content.items()}
        if min(measured, default=1) < 1:
            raise ValueError(f"a batch of {min(measured)}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say(f"{file} can't be read ({type(error).__name__}: {error})")
        return {}
    # What the package ships holds for every driver.
    differing = [name for name in now if made[name] != now[name] and (name != "driver" or file.parent != SHIPPED)]
    said = ", ".join(f"{name} {made[name]}, here {now[name]}" for name in differing)
    if _ABOUT.intersection(differing):
        _say(f"{file} is not of what its name says ({said})")
        return {}
    if differing:
        _say(f"what was measured in {file.parent} is of another time ({said})")
        return {}
    return measured


def _header(op: str, shape: str, device_name: str, driver: str) -> dict[str, object]:
    """What a file says beside its batches."""
    about = {"operator": op, "shape": shape, "device": device_name}
    return {"format": FORMAT, **about, "triton": triton.__version__, "driver": driver}


def _choice(entry: dict) -> Choice:
    if entry["runs"] == "stock":
        return Choice(True, {})
    if entry["runs"] != "triton" or not isinstance(entry["settings"], dict):
        raise ValueError(f"runs must be stock or triton, with settings; got {entry}")
    return Choice(False, entry["settings"])


def refuse(op: str, reason: str) -> None:
    """Says that what was measured for `op` does not run here."""
    _say(f"{op} does not run with what was measured for it ({reason})")


_said: set[str] = set()


def _say(what: str) -> None:
    """Once for each reason, however many files share it."""
    if what not in _said:
        _said.add(what)
        warnings.warn(f"deit_fast: {what}; left alone, run deit-fast tune again", stacklevel=2)
