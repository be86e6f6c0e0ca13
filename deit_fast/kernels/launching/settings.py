"""How launch settings are asked for, and how measured ones answer in place of those that are shipped.

A family's settings stand beside its kernels (`linear/settings.py`, …): functions of shape, dtype and architecture.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import NamedTuple


class Tile(NamedTuple):
    """A GEMM tile: `rows` × `columns` of the output, `depth` of the reduction a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


_thread = threading.local()


def setting(name: str) -> Callable[[Callable], Callable]:
    """Makes a function of shapes one of a table of settings, in whose place `settings` may answer, asked by `name`."""

    def decorate(function: Callable) -> Callable:
        shipped = lru_cache(maxsize=1024)(function)

        @wraps(function)
        def chosen(*arguments: object) -> object:
            given = getattr(_thread, "settings", None)
            found = shipped(*arguments)
            if given is None:
                return found
            asked = f"{name}({', '.join(map(str, arguments))})"
            answers, answered = given
            if asked in answers:
                found = _like(found, answers[asked])
            answered[asked] = found
            return found

        return chosen

    return decorate


@contextmanager
def settings(chosen: dict[str, object]) -> Iterator[dict[str, object]]:
    """Within the block, in this thread, the tables answer as `chosen` does where that knows what is asked.

    chosen: tiles, as such or by the names of their fields, by what is asked, "gemm(16384, 1152, 384, 2, sm_90, none)".
    Fills the dict that it gives with what was asked and answered.

    Raises:
        ValueError: when it is asked, if the answer in `chosen` is not of the kind that the table's is.
    """
    outer = getattr(_thread, "settings", None)
    answered: dict[str, object] = {}
    _thread.settings = (chosen, answered)
    try:
        yield answered
    finally:
        _thread.settings = outer


def _like(shipped: object, given: object) -> object:
    """`given`, which may come from a file, as what `shipped` is."""
    if isinstance(given, dict):
        if set(given) != set(getattr(shipped, "_fields", ())):
            raise ValueError(f"a setting has {', '.join(given)}; the table has {shipped}")
        return type(shipped)(**{name: _like(getattr(shipped, name), value) for name, value in given.items()})
    if isinstance(given, list):
        if not isinstance(shipped, tuple) or len(given) != len(shipped):
            raise ValueError(f"a setting has {len(given)} parts; the table has {shipped}")
        return tuple(_like(part, other) for part, other in zip(shipped, given, strict=True))
    if type(given) is not type(shipped):
        raise ValueError(f"a setting has {given!r}; the table has {shipped}")
    return given
