"""Functions made from text, as a namedtuple's methods are, where a loop at every call would take the host too long."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def function(parameters: Sequence[str], expression: str, **names: Any) -> Callable:
    """`expression` of `parameters` and of `names`, which it finds as globals."""
    return eval(f"lambda {', '.join(parameters)}: ({expression})", names)


def tuple_of(expressions: Iterable[str]) -> str:
    return f"({''.join(f'{each}, ' for each in expressions)})"


def procedure(parameters: Sequence[str], statements: Iterable[str], **names: Any) -> Callable:
    """The function that runs `statements`, of `parameters` and of `names`, which it finds as globals."""
    body = "".join(f"    {each}\n" for each in statements)
    exec(f"def run({', '.join(parameters)}):\n{body}", names)
    # Its globals are these names: not itself, so that nothing waits for the garbage collector.
    return names.pop("run")
