"""Which loop of the machine code is which of the source, how often it turns, and which programs go which way."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

import numpy as np

from evidence.clocks.flow import Flow
from evidence.clocks.source import Source, SourceLoop, Uncounted


@dataclass(frozen=True)
class Programs:
    """So many programs of a launch that enter the same loops; how often each loop turns, in the mean of them.

    flops: of their products, in the mean (NaN: not known).
    """

    count: int
    trips: dict[int, float]
    flops: float


def programs(flow: Flow, flops: Sequence[float | None], source: Source) -> list[Programs]:
    """flops: of each loop of the code for one turn, by its own matrix instructions; None where these don't tell."""
    turns: dict[int, np.ndarray] = {}
    for loop, (of_source, unrolled) in _matched(flow, flops, source.loops).items():
        if np.isnan(of_source.turns).any():
            raise Uncounted("how often a loop turns depends on what is read from memory")
        turns[loop] = of_source.turns / unrolled
    if not turns:
        return [Programs(len(source.each), {}, float(source.each.mean()))]
    ordered = sorted(turns)
    entered = np.stack([turns[loop] > 0 for loop in ordered])
    found = []
    for way in np.unique(entered, axis=1).T:
        these = (entered == way[:, None]).all(axis=0)
        trips = {loop: float(turns[loop][these].mean()) for loop in ordered}
        found.append(Programs(int(these.sum()), trips, float(source.each[these].mean())))
    return found


def less_peeled(flow: Flow, flops: Sequence[float | None], group: Programs, counted: float) -> dict[int, float]:
    """The trips of `group` without those that the compiler has put before or behind a loop.

    counted: FLOPs of a program with the loop turning in full, which are too many by the turns that stand elsewhere.
    """
    trips = dict(group.trips)
    for loop, of_turn in enumerate(flops):
        around = 1.0
        parent = flow.loops[loop].parent
        while parent is not None:
            around, parent = around * trips[parent], flow.loops[parent].parent
        if of_turn and around and trips[loop]:
            peeled = (counted - group.flops) / (of_turn * around)
            if 0 < peeled < trips[loop] and isclose(peeled, round(peeled), abs_tol=1e-6):
                return trips | {loop: trips[loop] - round(peeled)}
    return trips


def _matched(
    flow: Flow, flops: Sequence[float | None], loops: Sequence[SourceLoop]
) -> dict[int, tuple[SourceLoop, float]]:
    """To each loop of the code one of the source, and how many of its turns the code makes at a time.

    Loops are told apart by their products and their depth, and then by their order.
    """
    found: dict[int, tuple[SourceLoop, float]] = {}
    left = list(loops)
    for whole_turns in (True, False):
        for loop in range(len(flow.loops)):
            for candidate in left if loop not in found else []:
                factor = _unrolled(flops[loop], candidate.flops)
                if candidate.depth == flow.depth(loop) and factor and (factor == 1 or not whole_turns):
                    found[loop] = (candidate, factor)
                    left.remove(candidate)
                    break
    # A loop of the source that the code has not must have been unrolled whole.
    if len(found) < len(flow.loops) or any(len(set(loop.turns[loop.turns > 0])) > 1 for loop in left):
        raise Uncounted(f"{len(flow.loops)} loops in the machine code, {len(loops)} in the source")
    return found


def _unrolled(flops: float | None, of_source: float) -> float | None:
    """How many turns of the source one turn of the code makes; None where that is no whole number."""
    if flops is None:
        return 1.0 if of_source else None
    if not flops and not of_source:
        return 1.0
    if not flops or not of_source:
        return None
    factor = flops / of_source
    return float(round(factor)) if factor >= 1 and isclose(factor, round(factor)) else None
