"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A column whose name ends in a colon is one of figures."""
    lines = [
        [name.rstrip(":") for name in columns],
        ["---:" if name.endswith(":") else "---" for name in columns],
        *rows,
    ]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def figures(names: Iterable[str]) -> tuple[str, ...]:
    """Columns of figures."""
    return tuple(f"{name}:" for name in names)
