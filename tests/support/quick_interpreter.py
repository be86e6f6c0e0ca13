"""Makes Triton's interpreter patch its language once a launch instead of once a device-function call.

The stock interpreter walks all of `triton.language` at every call of a `@triton.jit` function from another
(`tl.sum` is one), which takes about half of a small kernel's time. What it sets there is the same each time.
"""

from functools import cache

import triton.language as tl
from triton.runtime import interpreter

_stock_patch_lang = interpreter._patch_lang
_patched: set = set()


@cache
def _languages(fn) -> frozenset:
    names = {id(value) for value in fn.__globals__.values()}
    return frozenset(lang for lang in (tl, tl.core) if id(lang) in names)


class _LaunchScope:
    """Undoes what the launch's functions patched, theirs last."""

    def __init__(self, scope) -> None:
        self.scopes = [scope]

    def restore(self) -> None:
        _patched.clear()
        while self.scopes:
            self.scopes.pop().restore()


_launch: _LaunchScope | None = None


def _patch_lang(fn):
    global _launch
    if not _patched:
        _launch = _LaunchScope(_stock_patch_lang(fn))
    elif not _languages(fn) <= _patched:
        _launch.scopes.append(_stock_patch_lang(fn))
    _patched.update(_languages(fn))
    return _launch


def install() -> None:
    """Patches the interpreter of this process; a second call changes nothing."""
    interpreter._patch_lang = _patch_lang
