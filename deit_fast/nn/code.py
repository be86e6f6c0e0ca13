"""Whether a class still computes what its library wrote: other libraries and users replace methods."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def original(cls: type, name: str) -> Callable | None:
    """The method `name` of `cls` as its library wrote it; None where somebody has replaced or wrapped it.

    Told by where the code was written, so a replacement made before this library was imported is seen as well. The
    library's own decorators, and torch's, may stand around it.
    """
    home = next((base for base in cls.__mro__ if name in vars(base)), None)
    if home is None:
        return None
    package = home.__module__.partition(".")[0]
    written: Any = getattr(cls, name)
    while hasattr(written, "__wrapped__"):
        if not written_by(written, package, "torch", "deit_fast"):
            return None
        written = written.__wrapped__
    code = getattr(written, "__code__", None)
    if code is None or code.co_filename != getattr(sys.modules.get(home.__module__), "__file__", None):
        return None
    # Python 3.10 has the plain name alone.
    expected = f"{home.__qualname__}.{name}" if hasattr(code, "co_qualname") else name
    return getattr(cls, name) if getattr(code, "co_qualname", code.co_name) == expected else None


def written_by(function: Any, *packages: str) -> bool:
    """Whether the file of `function` is one of these packages'."""
    code = getattr(function, "__code__", None)
    if code is None:
        return False
    files = (getattr(sys.modules.get(package), "__file__", None) for package in packages)
    return any(file and Path(code.co_filename).is_relative_to(Path(file).parent) for file in files)


class Code(NamedTuple):
    """What the modules of a class run: the class's own forward, and the stock class's for which that stands."""

    forward: Callable | None
    stock: Any
    stock_forward: Callable | None


def code_of(cls: Any, stock: Any, recognised: bool) -> Code:
    """`cls` computes what `stock` does, as long as nobody replaces either's forward."""
    return Code(cls.forward, stock, stock.forward if recognised else original(stock, "forward"))
