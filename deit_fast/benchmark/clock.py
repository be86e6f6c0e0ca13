"""How long a call takes: CUDA events behind a flushed L2 cache on a GPU, the wall clock on a CPU."""

import time
from collections.abc import Callable
from math import comb
from statistics import median
from typing import NamedTuple, Protocol, TypeVar

import torch

_Result = TypeVar("_Result")
# No GPU's L2 cache is larger.
_FLUSHED = 256 * 2**20
# A timing on a CPU is at least as long, that the clock and the first call weigh nothing.
_LEAST_SECONDS = 0.05


class Clock(Protocol):
    def calls(self, call: Callable[[], object]) -> int:
        """How many calls one timing takes; makes some, which warm up."""

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        """Of one call, from one timing."""


class CpuClock:
    def calls(self, call: Callable[[], object]) -> int:
        call()
        began = time.perf_counter()
        call()
        return max(1, round(_LEAST_SECONDS / max(time.perf_counter() - began, 1e-9)))

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls


class GpuClock:
    """As `triton.testing.do_bench`: every call between two events of its own, the cache flushed before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cache = torch.empty(_FLUSHED, dtype=torch.int8, device=device)

    def calls(self, call: Callable[[], object]) -> int:
        for _ in range(3):
            call()
        return max(1, min(100, round(_LEAST_SECONDS / max(self.seconds(call, 3), 1e-6))))

    def seconds(self, call: Callable[[], object], calls: int) -> float:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for began, ended in events:
            self._cache.zero_()
            began.record()
            call()
            ended.record()
        torch.cuda.synchronize(self.device)
        return median(began.elapsed_time(ended) for began, ended in events) / 1e3


_GRAPHED = 20  # calls in a graph
_REPLAYS = 5


def captured(call: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A CUDA graph of `call`, which runs once before, and what it returned while it was captured."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Entered here too, since a capture that fails may not leave it.
    with torch.cuda.stream(beside), torch.cuda.graph(graph, stream=beside):
        result = call()
    return graph, result


def graph_seconds(call: Callable[[], object]) -> float:
    """Of one call on a GPU, without the host's part: from a CUDA graph of many. The L2 cache is as the last left it."""

    def calls() -> None:
        for _ in range(_GRAPHED):
            call()

    graph, _ = captured(calls)
    graph.replay()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds = []
    for _ in range(_REPLAYS):
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        seconds.append(began.elapsed_time(ended) / 1e3 / _GRAPHED)
    return median(seconds)


class Interval(NamedTuple):
    """A median with what it may be at 95 %, by order statistics: no shape of the noise is assumed."""

    median: float
    low: float
    high: float


def interval(values: list[float]) -> Interval:
    """Fewer than 6 values cannot exclude any value at 95 %: then the interval is all of them."""
    ordered, n = sorted(values), len(values)
    outside, rank = 0.0, 0
    # The chance that fewer than `rank` + 1 of n values lie below the true median, on either side.
    while rank < (n - 1) // 2 and 2 * (outside + comb(n, rank) / 2**n) <= 0.05:
        outside += comb(n, rank) / 2**n
        rank += 1
    rank = max(rank - 1, 0)
    return Interval(median(ordered), ordered[rank], ordered[n - 1 - rank])


def faster(ours: list[float], theirs: list[float]) -> Interval | None:
    """How many times faster, round by round; None where rounds are missing."""
    if not ours or len(ours) != len(theirs):
        return None
    return interval([other / own for own, other in zip(ours, theirs, strict=True)])
