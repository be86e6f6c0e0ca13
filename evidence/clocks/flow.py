"""The flow of control of a compiled kernel: basic blocks, dominators, natural loops, and the way a program takes.

(Aho, Lam, Sethi & Ullman 2006, 'Compilers', chapters 8.4 and 9.6.)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter


@dataclass(frozen=True)
class Instruction:
    """stall: clocks that the code itself says to wait after it. target: where it jumps, by position.

    falls: whether the next instruction may follow. idle: whether it does nothing but wait or jump.
    """

    name: str
    text: str
    stall: int = 1
    target: int | None = None
    falls: bool = True
    idle: bool = False


@dataclass
class Loop:
    """A natural loop: its header's block and all its blocks; the loop around it, if any."""

    header: int
    blocks: set[int]
    parent: int | None = None


@dataclass
class Flow:
    """blocks: the instructions of each; following: blocks that may come after it; loops: by their place in the code."""

    blocks: list[list[Instruction]]
    following: list[list[int]]
    loops: list[Loop] = field(init=False)
    dominators: dict[int, set[int]] = field(init=False)  # of each block that can be reached
    innermost: dict[int, int | None] = field(init=False)  # the loop of each block

    def __post_init__(self) -> None:
        self.dominators = _dominators(self.following)
        self.loops = self._natural_loops()
        for loop in self.loops:
            around = [i for i, other in enumerate(self.loops) if loop.blocks < other.blocks]
            loop.parent = min(around, key=lambda i: len(self.loops[i].blocks), default=None)
        self.innermost = {
            block: min(
                (i for i, loop in enumerate(self.loops) if block in loop.blocks),
                key=lambda i: len(self.loops[i].blocks),
                default=None,
            )
            for block in self.dominators
        }

    def depth(self, loop: int) -> int:
        parent = self.loops[loop].parent
        return 0 if parent is None else 1 + self.depth(parent)

    def own_blocks(self, loop: int | None) -> list[int]:
        """The blocks of a loop, or of no loop, without those of the loops within it."""
        return [block for block, inner in self.innermost.items() if inner == loop]

    def _natural_loops(self) -> list[Loop]:
        found: dict[int, set[int]] = {}
        preceding = _preceding(self.following, self.dominators)
        for block, above in self.dominators.items():
            for header in self.following[block]:
                # A wait for a barrier or for tensor memory, or the trap behind the last instruction.
                body = self.blocks[block]
                sleeping = any(instruction.name.startswith("NANOSLEEP") for instruction in body)
                waiting = header == block and (sleeping or all(instruction.idle for instruction in body))
                if header in above and not waiting:
                    found.setdefault(header, {header}).update(_reaching(block, header, preceding))
        return [Loop(header, blocks) for header, blocks in sorted(found.items())]

    def way(self, trips: Mapping[int, float], cost: Callable[[int], float]) -> dict[int, float]:
        """How often a program runs each block, on its way through the code.

        trips: of each loop, for each time that the loop around it turns. Arms of the code that hold a loop of none are
        not entered; of all other ways the program takes the one of the highest cost, where `cost` is a block's. If it
        enters no loop though there are some, it takes the one of the lowest: it has nothing to do.
        """
        entered = [loop for loop in range(len(self.loops)) if self._times(loop, trips) > 0]
        skipped = [loop for loop in range(len(self.loops)) if loop not in entered]
        idle = bool(skipped) and not entered
        closed: set[int] = set()
        for loop in skipped:
            closed |= self.loops[loop].blocks if idle else self._arm(loop, entered)
        times = {block: self._times(inner, trips) for block, inner in self.innermost.items() if block not in closed}
        return {block: times[block] for block in self._best(times, cost, 1 if idle else -1)}

    def _times(self, loop: int | None, trips: Mapping[int, float]) -> float:
        return 1.0 if loop is None else trips.get(loop, 0.0) * self._times(self.loops[loop].parent, trips)

    def _arm(self, loop: int, entered: Sequence[int]) -> set[int]:
        """The blocks that can be reached only through the arm of the code that this loop is in."""
        needed = [self.loops[other].header for other in entered]
        header = self.loops[loop].header
        above = sorted(self.dominators[header], key=lambda block: len(self.dominators[block]))
        gate = next(block for block in above if not any(block in self.dominators[other] for other in needed))
        return {block for block, dominators in self.dominators.items() if gate in dominators}

    def _best(self, times: Mapping[int, float], cost: Callable[[int], float], sign: int) -> list[int]:
        """The way from the first block to an end that costs most (sign -1) or least (1), through each loop once."""
        after: dict[int, list[int]] = {block: [] for block in times}
        for block in times:
            for following in self.following[block]:
                if following not in times:
                    continue
                if following in self.dominators[block]:  # back to a loop's header, or waiting: on to where it leads
                    turned = next((loop.blocks for loop in self.loops if loop.header == following), set())
                    after[block] += [
                        out for inside in turned for out in self.following[inside] if out in times and out not in turned
                    ]
                else:
                    after[block].append(following)
        best: dict[int, tuple[float, list[int]]] = {}
        for block in TopologicalSorter(after).static_order():
            # Nothing after it: the end of the program, or code that is left out.
            total, blocks = min((best[out] for out in after[block]), key=lambda way: sign * way[0], default=(0.0, []))
            best[block] = times[block] * cost(block) + total, [block, *blocks]
        return best[0][1]


def flow(instructions: Sequence[Instruction]) -> Flow:
    starts = {0}
    for position, instruction in enumerate(instructions):
        if instruction.target is not None:
            starts.add(instruction.target)
        if instruction.target is not None or not instruction.falls:
            starts.add(position + 1)
    ordered = sorted(start for start in starts if start < len(instructions))
    number = {start: block for block, start in enumerate(ordered)}
    blocks, following = [], []
    for start, end in zip(ordered, [*ordered[1:], len(instructions)], strict=True):
        blocks.append(list(instructions[start:end]))
        last = blocks[-1][-1]
        targets = [number[last.target]] if last.target in number else []
        following.append(targets + ([number[end]] if last.falls and end in number else []))
    return Flow(blocks, following)


def _preceding(following: Sequence[Sequence[int]], among: Iterable[int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {block: [] for block in among}
    for block in found:
        for other in following[block]:
            found[other].append(block)
    return found


def _dominators(following: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Of each block that can be reached, the blocks on every way to it, itself included."""
    reached: list[int] = []
    waiting = [0]
    while waiting:
        block = waiting.pop()
        if block not in reached:
            reached.append(block)
            waiting += following[block]
    preceding = _preceding(following, reached)
    found = {block: {0} if block == 0 else set(reached) for block in reached}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached)[1:]:
            new = set.intersection(*(found[before] for before in preceding[block])) | {block}
            changed |= new != found[block]
            found[block] = new
    return found


def _reaching(block: int, header: int, preceding: Mapping[int, Sequence[int]]) -> set[int]:
    """The blocks from which `block` is reached without passing `header`."""
    found: set[int] = set()
    waiting = [block]
    while waiting:
        at = waiting.pop()
        if at not in found and at != header:
            found.add(at)
            waiting += preceding[at]
    return found
