"""summary.md, one page: what failed, what is slower than stock and by how much, in which launch."""

from collections.abc import Iterable

from deit_fast.benchmark.candidates import kernels_chosen
from deit_fast.benchmark.gpu.bounds import bound
from deit_fast.benchmark.gpu.launches import FLASH
from deit_fast.benchmark.gpu.models import COMPILED, EAGER
from deit_fast.benchmark.gpu.record import Record, RecordEntry
from deit_fast.benchmark.tables import figures, table

_MOST = 12  # rows of a table: one page


def summary(record: Record) -> str:
    parts = [f"# deit_fast on {record.environment['device']}"]
    parts.append("; ".join(f"{name} {value}" for name, value in record.environment.items() if name != "device"))
    peaks = record.result("contact", "peaks")
    if peaks is not None:
        parts.append(
            f"Measured peaks: {peaks['flops']['bfloat16'] / 1e12:.0f} TFLOP/s in bfloat16, "
            f"{peaks['bandwidth'] / 1e12:.2f} TB/s."
        )
    parts += ["## What failed", _listed(failures(record)) or "Nothing that was reached."]
    fallbacks = sorted({reason for found in _results(record) for reason in found.get("fallbacks", ())})
    parts += ["## Left to stock operators by design", _listed(fallbacks) or "Nothing that was reached."]
    by_vendor = dict.fromkeys(product for found in _results(record, "launches") for product in found["by the vendor"])
    parts += ["## By the vendor's GEMM, as shipped", _listed(by_vendor) or "Nothing that was reached."]
    parts += [f"## {title}\n\n{found}" for title, found in measured(record).items()]
    tuned = [found for found in _results(record, "tuning") if found.get("file")]
    parts += ["## Tuned settings, in tuned/", _listed(map(_tuned, tuned)) or "Not reached."]
    missed = [f"{step}: {len(names)}, from {names[0]} on" for step, names in record.not_reached.items()]
    parts += ["## Not reached", _listed(missed) or "Everything was reached."]
    return "\n\n".join(parts) + "\n"


def measured(record: Record) -> dict[str, str]:
    """Tables by title, of what was reached."""
    tables = {
        "Operators, the slowest beside stock first": _operators(record),
        "Launches, the furthest from their bound first (what lies in the L2 cache can pass it)": _launches(record),
        "Blocks and models": _models(record),
    }
    return {title: found for title, found in tables.items() if found}


def failures(record: Record) -> list[str]:
    """Tasks without a result, results that are wrong, and what differs where nothing may."""
    found = []
    for entry in record.entries:
        result = entry.result if isinstance(entry.result, dict) else {}
        if entry.failure is not None:
            found.append(f"{entry.step}: {entry.name}: {entry.failure}")
        if entry.step == "compile":
            found += [f"does not compile: {kernel}: {why}" for kernel, why in result.get("failed", {}).items()]
        elif result.get("failed"):
            wrong = result["failed"]
            found.append(f"{len(wrong)} of {result['results']} results of {wrong[0]['said']}")
        if entry.name == "plans" and entry.result and result["launches through Triton"] != [1, 0, 0]:
            found.append(f"launches are not repeated from plans: {result}")
        if result.get("different"):
            found.append(f"{entry.name}: {', '.join(result['different'])} differ")
    return list(dict.fromkeys(found))


def _results(record: Record, step: str | None = None) -> Iterable[dict]:
    entries = record.entries if step is None else record.of(step)
    return (entry.result for entry in entries if isinstance(entry.result, dict))


def _operators(record: Record) -> str:
    timed = [
        (entry, _ratio(entry)) for entry in record.of("launches") if entry.result and "stock" in entry.result["seconds"]
    ]
    rows = []
    for entry, ratio in sorted(timed, key=lambda pair: pair[1])[:_MOST]:
        seconds = dict(entry.result["seconds"])
        ours = seconds.pop("deit_fast")
        others = ", ".join(f"{name} {_us(value)}" for name, value in seconds.items())
        rows.append((entry.name, _us(ours), others, f"{ratio:.2f}", _share(record, entry.result, ours)))
    return "" if not rows else table(("operator", *figures(("µs", "others", "times faster", "of bound"))), rows)


def _ratio(entry: RecordEntry) -> float:
    """Of the fastest that computes the same, to ours."""
    seconds = entry.result["seconds"]
    return min(seconds[name] for name in ("stock", FLASH) if name in seconds) / seconds["deit_fast"]


def _launches(record: Record) -> str:
    found = [
        (entry.name, launch) for entry in record.of("launches") if entry.result for launch in entry.result["launches"]
    ]
    least = {id(launch): bound(record, launch["flops"], launch["bytes"]) or 0.0 for _, launch in found}
    rows = []
    for name, launch in sorted(found, key=lambda pair: least[id(pair[1])] - pair[1]["seconds"])[:_MOST]:
        seconds = launch["seconds"]
        rates = f"{launch['flops'] / seconds / 1e12:.1f}", f"{launch['bytes'] / seconds / 1e12:.2f}"
        share = _share(record, launch, seconds)
        rows.append(
            (f"{launch['name']} ({name})", _us(seconds), *rates, share, str(launch["registers"]), str(launch["spills"]))
        )
    columns = ("µs", "TFLOP/s", "TB/s", "of bound", "registers", "spills")
    return "" if not rows else table(("launch", *figures(columns)), rows)


def _models(record: Record) -> str:
    found = {entry.name: entry.result for step in ("models", "compiled") for entry in record.of(step) if entry.result}
    names = dict.fromkeys(_of(name) for name in found)
    contenders = (*EAGER, *COMPILED)
    rows = []
    for name in names:
        seconds = [found.get(f"{name}, {contender}", {}).get("seconds") for contender in contenders]
        ratios = [f"{stock / ours:.2f}" if stock and ours else "" for stock, ours in (seconds[:2], seconds[2:])]
        rows.append((name, *("" if each is None else f"{1e3 * each:.2f}" for each in seconds), *ratios))
    columns = (*(f"{each}, ms" for each in contenders), "times faster", "compiled, times faster")
    return "" if not rows else table(("step", *figures(columns)), rows)


def _tuned(found: dict) -> str:
    chosen = [f"batch {found['batch']}", *kernels_chosen(found.get("settings", {}))]
    return f"{found['file']}: {found['operator']} {found['shape']}, {', '.join(chosen)}"


def _of(name: str) -> str:
    """A task's name without its contender."""
    for contender in (*COMPILED, *EAGER):
        if name.endswith(f", {contender}"):
            return name.removesuffix(f", {contender}")
    return name


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def _share(record: Record, found: dict, seconds: float) -> str:
    least = bound(record, found["flops"], found["bytes"])
    return "" if least is None else f"{100 * least / seconds:.0f} %"


def _listed(lines: Iterable[str]) -> str:
    lines = list(lines)
    more = [f"- and {len(lines) - _MOST} more, in results.json"] if len(lines) > _MOST else []
    return "\n".join([*(f"- {line}" for line in lines[:_MOST]), *more])
