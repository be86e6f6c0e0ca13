"""How far what was timed is from the least that its FLOPs and bytes can take at the peaks measured in step 1."""

from deit_fast.benchmark.gpu.record import Record, RecordEntry
from deit_fast.benchmark.peaks import Peaks


def bound(record: Record, flops: float, moved: float) -> float | None:
    """Seconds, in bfloat16; None before the peaks are measured."""
    found = record.result("contact", "peaks")
    return None if found is None else Peaks(**found).bound("bfloat16", flops, moved)


def furthest_from_bound(record: Record) -> list[str]:
    """Timed operators, by how many seconds of a step they take beyond their bound."""

    def beyond(entry: RecordEntry) -> float:
        found = entry.result
        least = bound(record, found["flops"], found["bytes"]) or 0.0
        return found["times"] * (found["seconds"]["deit_fast"] - least)

    timed = [entry for entry in record.of("launches") if entry.result]
    return [entry.name for entry in sorted(timed, key=beyond, reverse=True)]


def worst_launches(record: Record) -> list[tuple[str, str]]:
    """The operator and the symbol of each timed launch, by how many seconds it takes beyond its bound."""
    found = [
        (launch["seconds"] - (bound(record, launch["flops"], launch["bytes"]) or 0.0), entry.name, launch["symbol"])
        for entry in record.of("launches")
        if entry.result
        for launch in entry.result["launches"]
    ]
    return [(name, symbol) for _, name, symbol in sorted(found, reverse=True)]
