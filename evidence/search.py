"""Tries other launch settings by compiling them: what the kernels' settings were filled in with.

    python -m evidence.search attention 64,16,8,1 32,32,4,1 --targets sm_80 --precisions fp32 [--models tiny]

The first argument is a function of a settings.py, each further one a tile for it to return: its fields in order, and
with '/' between them where it returns several tiles; yes or no where it returns that. Every launch whose settings that
changes is compiled; a line tells the worst of them, the shipped setting's first. Compiling shows what fits and what
spills. It shows no time.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

from deit_fast.check.targets import TARGETS
from deit_fast.kernels import attention, layer_norm, linear, mlp, patch_embed, readout
from evidence.kernels import SPAWN, WORKERS, compiled, each_alone, launches_on, problem
from evidence.launches import MODELS, PRECISIONS, SUITES
from evidence.models import choices

TABLES = (attention.settings, layer_norm.settings, linear.settings, mlp, patch_embed.settings, readout.settings)


def replaced(shipped, candidate: str):
    """`candidate` as what the function returns in place of `shipped`: a tile, or several, or yes or no."""
    if isinstance(shipped, bool):
        if candidate not in ("yes", "no"):
            raise SystemExit(f"{candidate} is neither yes nor no")
        return candidate == "yes"
    tiles = candidate.split("/")
    if isinstance(shipped[0], tuple):
        return tuple(replaced(tile, text) for tile, text in zip(shipped, tiles, strict=True))
    fields = [int(field) for field in candidate.split(",")]
    if len(fields) != len(shipped):
        raise SystemExit(f"{candidate} has {len(fields)} fields, {type(shipped).__name__} has {len(shipped)}")
    return type(shipped)(*fields)


def rows_with(function: str, candidate: str | None, target: str, *what) -> dict[str, dict]:
    table = next(table for table in TABLES if hasattr(table, function))
    shipped = getattr(table, function)

    def chosen(*arguments):
        return shipped(*arguments) if candidate is None else replaced(shipped(*arguments), candidate)

    with mock.patch.object(table, function, chosen):
        return launches_on(target, *what)[0]


def line(candidate: str | None, rows: list[dict]) -> str:
    good = [row for row in rows if not row["error"]]
    problems = sorted({problem(row) or "" for row in rows} - {""})
    worst = "does not compile"
    if good:
        worst = (
            f"{max(row['registers'] for row in good):4} registers  {max(row['spilled'] for row in good):5} B spilled  "
            f"{max(row['shared_memory'] for row in good):7} B shared  {min(row['programs'] for row in good):2} programs"
        )
    return f"  {candidate or 'shipped':24} {len(rows):3} launches  {worst}  {'; '.join(problems)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("function")
    parser.add_argument("candidates", nargs="+")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default="tiny,3-huge")
    parser.add_argument("--suites", default=",".join(SUITES))
    parser.add_argument("--precisions", default="bf16")
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    if not any(hasattr(table, arguments.function) for table in TABLES):
        raise SystemExit(f"no settings.py has a function {arguments.function!r}")
    what = (
        choices(arguments.models, MODELS, "model"),
        choices(arguments.suites, SUITES, "suite"),
        choices(arguments.precisions, PRECISIONS, "precision"),
        arguments.batch,
    )
    for target in choices(arguments.targets, TARGETS, "target"):
        print(target)
        candidates = (None, *arguments.candidates)
        found = each_alone(rows_with, [(arguments.function, candidate, target, *what) for candidate in candidates])
        tried = dict(zip(candidates, found, strict=True))
        # Shipped launches that some candidate changes; of a candidate, those that are not shipped.
        changed = {key for rows in list(tried.values())[1:] for key in tried[None].keys() - rows.keys()}
        with ProcessPoolExecutor(WORKERS, mp_context=SPAWN) as pool:
            for candidate, rows in tried.items():
                chosen = [
                    row
                    for key, row in rows.items()
                    if (key in changed if candidate is None else key not in tried[None])
                ]
                print(line(candidate, list(pool.map(compiled, chosen))), flush=True)


if __name__ == "__main__":
    main()
