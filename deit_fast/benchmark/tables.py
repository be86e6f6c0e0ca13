"""Tables in Markdown."""

from collections.abc import Iterable, Sequence

from deit_fast.benchmark.clock import Interval


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


def spread(values: Interval | None, scale: float = 1.0, digits: int = 2) -> str:
    """A median with what it may be; empty where there is none."""
    if values is None:
        return ""
    median, low, high = (f"{scale * value:.{digits}f}" for value in values)
    return f"{median} ({low}–{high})"


def remarks(rows: Iterable) -> list[str]:
    """A list under a table, of where stock operators answered for deit_fast's; nothing where none did."""
    said = dict.fromkeys(f"- {row.contender}: {fallback}" for row in rows for fallback in row.fallbacks)
    return ["\n".join(said)] if said else []
