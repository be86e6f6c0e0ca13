"""`make fuzz MINUTES=20`: cases of every operator, from fresh seeds, until the time is up.

Prints how many cases each operator has had. A failure is shrunk and printed as a case to paste:
`PROPERTIES["linear"][1](DrawnCase(…))`; its operator is then left out.
"""

import argparse
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle, islice
from secrets import randbits

import tests.conftest  # noqa: F401  (the interpreter, before anything imports triton)

from hypothesis import HealthCheck, given, seed, settings  # isort: skip

from tests.fuzz.properties import PROPERTIES  # isort: skip

_A_TURN = 10


def draw_until(end: float, worker: int) -> tuple[Counter, set[str]]:
    """Cases by operator, and the operators that failed; workers begin with different operators."""
    # Overflow, NaN and infinity are among the inputs; numpy's remarks about them are not news.
    warnings.simplefilter("ignore", RuntimeWarning)
    counts, failed = Counter(), set()
    start = worker * len(PROPERTIES) // 2 % len(PROPERTIES)
    for op in islice(cycle(PROPERTIES), start, None):
        if time.time() > end or len(failed) == len(PROPERTIES):
            return counts, failed
        if op not in failed and not _turn(op, randbits(32), end, counts):
            failed.add(op)


def _turn(op: str, number: int, end: float, counts: Counter) -> bool:
    cases, check = PROPERTIES[op]

    def counted(case) -> None:
        if time.time() < end:
            counts[op] += 1
            check(case)

    rules = settings(max_examples=_A_TURN, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    try:
        seed(number)(rules(given(cases)(counted)))()
    except Exception as failure:
        print(f"{op}, seed {number}:\n{''.join(traceback.format_exception(failure))}", flush=True)
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    end = time.time() + 60 * options.minutes
    with ProcessPoolExecutor(options.workers) as pool:
        found = list(pool.map(draw_until, [end] * options.workers, range(options.workers)))
    counts = sum((counts for counts, _ in found), Counter())
    failed = set().union(*(failed for _, failed in found))
    for op in PROPERTIES:
        print(f"{counts[op]:7} {op}{'  FAILED' if op in failed else ''}")
    print(f"{counts.total():7} cases in {options.minutes:g} minutes, {len(failed)} operators failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
