"""How often a kernel's loops turn and which of its branches are taken, for the very sizes of a launch.

Triton's last intermediate representation that still has loops (TTGIR) is run for all programs of the launch at once,
its scalars only: what is known of a launch are its grid and its arguments. A number that a program reads from memory
is taken to be the highest index of its tensor: drop path, which has such numbers, then keeps every sample.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Values = np.ndarray  # of one scalar, a number for each program; NaN where it is not known


class Uncounted(Exception):
    """Why a launch can't be counted."""


@dataclass(eq=False)
class SourceLoop:
    """A `for` of the source. turns: of each program, for each time that the loop around it turns (NaN: not known).

    flops: of its own dots for one turn, two a multiply-add; rows that several warps compute alike count for each. Loops
    within it have theirs.
    """

    depth: int
    turns: Values
    flops: float = 0


@dataclass
class Source:
    """flops: outside the loops, all branches together; each: all FLOPs of each program (NaN: not known)."""

    loops: list[SourceLoop] = field(default_factory=list)
    flops: float = 0
    each: Values = field(default_factory=lambda: np.zeros(1))


_LOCATION = re.compile(r" loc\((?:#loc\d*|unknown|\"[^\n]*)\)$")
_ARGUMENT = re.compile(r"%(\w+): [^%]*? loc\(\"(\w+)\"")
_CONSTANT = re.compile(r"%(\S+) = arith\.constant (-?\d+|true|false)(?: : \w+)?$")
_BINARY = re.compile(
    r"%(\S+) = arith\.(\w+?)(?: (slt|sle|sgt|sge|ult|ule|ugt|uge|eq|ne))?,? %(\S+), %(\S+) : (?:i\d+|index)$"
)
_CAST = re.compile(r"%(\S+) = arith\.(?:extsi|extui|trunci|index_cast) %(\S+) : \w+ to \w+$")
_SELECT = re.compile(r"%(\S+) = arith\.select %(\S+), %(\S+), %(\S+) : (?:i\d+|index)$")
_PROGRAM = re.compile(r"%(\S+) = tt\.get_(program_id|num_programs) ([xyz]) : i32$")
_READ = re.compile(r"%(\S+) = tt\.load %(\S+)[^:]* : !tt\.ptr<i\d+>$")
_FOR = re.compile(
    r"(?:%([\w-]+)(?::\d+)? = )?scf\.for(?: unsigned)? %(\S+) = %(\S+) to %(\S+) step %(\S+)"
    r"(?: iter_args\((.*?)\) ->)?.*\{$"
)
_IF = re.compile(r"(?:%([\w-]+)(?::(\d+))? = )?scf\.if %(\S+) .*\{$")
_YIELD = re.compile(r"scf\.yield (.*?) :")
_JUMP = re.compile(r"cf\.br \^(\w+)(?:\((.*?) :.*\))?$")
_BRANCH = re.compile(r"cf\.cond_br %(\S+), \^(\w+)(?:\((.*?) :.*?\))?, \^(\w+)(?:\((.*?) :.*?\))?$")
_BLOCK = re.compile(r"\^(\w+)(?:\((.*)\))?:")
_LAYOUT = re.compile(r"^(#\w+) = #ttg\.(?:nvidia_mma|amd_mfma|amd_wmma)<(.*)>$", re.M)
_DOT = re.compile(
    r"= (?:tt\.dot|ttng\.warp_group_dot) .*: \S*<(\d+)x(\d+)x\w+, .*? \* \S*<\d+x(\d+)x\w+,.*"
    r" -> tensor<\S+, (?P<layout>#\w+)>$"
)
_TENSOR_MEMORY_DOT = re.compile(r"\bttng\.tc_gen5_mma .*: !ttg\.memdesc<(\d+)x(\d+)x\w+, .*?, !ttg\.memdesc<\d+x(\d+)x")

_OPERATIONS: dict[str, Callable[[Values, Values], Values]] = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "divsi": lambda a, b: np.trunc(a / b),
    "divui": lambda a, b: np.trunc(a / b),
    "ceildivsi": lambda a, b: np.ceil(a / b),
    "remsi": np.fmod,
    "remui": np.fmod,
    "minsi": np.minimum,
    "minui": np.minimum,
    "maxsi": np.maximum,
    "maxui": np.maximum,
    "andi": lambda a, b: _bits(np.bitwise_and, a, b),
    "ori": lambda a, b: _bits(np.bitwise_or, a, b),
    "xori": lambda a, b: _bits(np.bitwise_xor, a, b),
    "shli": lambda a, b: a * 2.0**b,
    "shrsi": lambda a, b: np.floor(a / 2.0**b),
    "shrui": lambda a, b: np.floor(a / 2.0**b),
}
_COMPARISONS = {
    "slt": np.less, "ult": np.less, "sle": np.less_equal, "ule": np.less_equal, "sgt": np.greater, "ugt": np.greater,
    "sge": np.greater_equal, "uge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _bits(operation: np.ufunc, a: Values, b: Values) -> Values:
    known = ~(np.isnan(a) | np.isnan(b))
    integers = (np.where(known, x, 0).astype(np.int64) for x in (a, b))
    return np.where(known, operation(*integers), np.nan)


def source(
    ttgir: str, grid: Sequence[int], scalars: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
) -> Source:
    """What the kernel of `ttgir` does for a launch over `grid` with the arguments `scalars` and tensors of `shapes`."""
    return _Run(ttgir, grid, scalars, shapes).found


class _Run:
    def __init__(
        self, ttgir: str, grid: Sequence[int], scalars: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self.found = Source()
        self.layouts = {name: _layout(text) for name, text in _LAYOUT.findall(ttgir)}
        lines = [_LOCATION.sub("", line.strip()) for line in ttgir.splitlines()]
        first = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
        if any(line.startswith("tt.func") for line in lines[first + 1 :]):
            raise Uncounted("the kernel calls functions that are not inlined")
        self.lines, self.at = lines, first + 1
        self.programs = int(np.prod(grid))
        self.found.each = self._same(0)
        index = np.arange(self.programs)
        self.ids = {
            "x": index % grid[0],
            "y": index // grid[0] % grid[1],
            "z": index // (grid[0] * grid[1]),
        }
        self.grid = dict(zip("xyz", grid, strict=True))
        self.values: dict[str, Values] = {}
        self.passed: dict[tuple[str, int], Values] = {}  # what jumps hand to a block
        self.largest: dict[str, float] = {}
        for name, argument in _ARGUMENT.findall(lines[first]):
            if argument in scalars:
                self.values[name] = self._same(scalars[argument])
            if argument in shapes:
                self.largest[name] = float(np.prod(shapes[argument])) - 1
        self._function()

    def _same(self, value: float) -> Values:
        return np.full(self.programs, float(value))

    def _value(self, name: str) -> Values:
        return self.values.get(name.strip().lstrip("%"), self._same(np.nan))

    def _function(self) -> None:
        # Of its blocks, each program runs those that a jump leads to.
        running = {"": self._same(1)}
        block = ""
        while True:
            active = running.get(block, self._same(0))
            end = self._straight(active, None)
            if jump := _JUMP.match(end):
                self._jump(running, jump[1], jump[2], active)
            elif branch := _BRANCH.match(end):
                condition = self._value(branch[1])
                self._jump(running, branch[2], branch[3], active * (np.isnan(condition) | (condition != 0)))
                self._jump(running, branch[4], branch[5], active * (np.isnan(condition) | (condition == 0)))
            elif not end.startswith("tt.return"):
                raise Uncounted(f"a block that ends in {end[:60]!r}")
            while not self.lines[self.at].startswith("^"):
                if self.lines[self.at] == "}":
                    return
                self.at += 1
            header = _BLOCK.match(self.lines[self.at])
            if header is None:
                raise Uncounted(f"a block that begins with {self.lines[self.at][:60]!r}")
            block = header[1]
            for i, argument in enumerate(re.findall(r"%(\w+):", header[2] or "")):
                if (block, i) in self.passed:
                    self.values[argument] = self.passed[block, i]
            self.at += 1

    def _jump(self, running: dict[str, Values], block: str, arguments: str | None, active: Values) -> None:
        running[block] = np.maximum(running.get(block, self._same(0)), active)
        for i, name in enumerate((arguments or "").split(",") if arguments else []):
            before = self.passed.get((block, i), self._same(np.nan))
            self.passed[block, i] = np.where(active != 0, self._value(name), before)

    def _straight(self, times: Values, loop: SourceLoop | None) -> str:
        """Runs to the end of a block or region, which each program does so many times; returns its last line."""
        while True:
            line = self.lines[self.at]
            self.at += 1
            if line.startswith(("scf.yield", "cf.", "tt.return", "}")) or not line:
                return line
            if match := _FOR.match(line):
                self._for(match, times, 0 if loop is None else loop.depth + 1)
            elif match := _IF.match(line):
                self._if(match, times, loop)
            elif line.endswith("({"):
                self._skip()
            elif line.endswith("{"):
                raise Uncounted(f"control flow of an unknown kind: {line[:60]!r}")
            else:
                self._operation(line, self.found if loop is None else loop, times)

    def _skip(self) -> None:
        """The region of a reduction."""
        open_regions = 1
        while open_regions:
            line = self.lines[self.at]
            open_regions += line.endswith("({") - line.startswith("})")
            self.at += 1

    def _for(self, match: re.Match, times: Values, depth: int) -> None:
        low, high, step = (self._value(match[i]) for i in (3, 4, 5))
        turns = np.maximum(0, np.ceil((high - low) / step))
        loop = SourceLoop(depth, np.where(times == 0, 0, turns))
        self.found.loops.append(loop)
        self.values[match[2]] = low
        carried = [pair.split(" = ") for pair in (match[6] or "").split(", ") if " = " in pair]
        for name, start in carried:
            self.values[name.strip("% ")] = self._value(start)
        self._straight(np.where(times == 0, 0, times * turns), loop)
        self._close()

    def _if(self, match: re.Match, times: Values, loop: SourceLoop | None) -> None:
        condition = self._value(match[3])
        first, second = (times * (np.isnan(condition) | holds) for holds in (condition != 0, condition == 0))
        yielded = [self._yields(first, loop)]
        if self.lines[self.at - 1].startswith("} else") or self.lines[self.at].startswith("} else"):
            self.at += self.lines[self.at].startswith("} else")
            yielded.append(self._yields(second, loop))
        self._close()
        if match[1] and len(yielded) == 2:
            for i, (one, other) in enumerate(zip(*yielded, strict=True)):
                chosen = np.where(np.isnan(condition), np.nan, np.where(condition != 0, one, other))
                self.values[match[1] if match[2] is None else f"{match[1]}#{i}"] = chosen

    def _yields(self, times: Values, loop: SourceLoop | None) -> list[Values]:
        line = self._straight(times, loop)
        found = _YIELD.match(line)
        return [self._value(name) for name in found[1].split(", ")] if found else []

    def _close(self) -> None:
        """Past the brace that ends a region, where a yield came before it."""
        if self.lines[self.at - 1].startswith("scf.yield") and self.lines[self.at].startswith("}"):
            self.at += 1

    def _operation(self, line: str, into: Source | SourceLoop, times: Values) -> None:
        if match := _CONSTANT.match(line):
            words = {"true": 1, "false": 0}
            self.values[match[1]] = self._same(words[match[2]] if match[2] in words else int(match[2]))
        elif match := _BINARY.match(line):
            a, b = self._value(match[4]), self._value(match[5])
            if match[2] == "cmpi":
                result = np.where(np.isnan(a) | np.isnan(b), np.nan, _COMPARISONS[match[3]](a, b))
            elif match[2] in _OPERATIONS:
                with np.errstate(divide="ignore", invalid="ignore"):
                    result = _OPERATIONS[match[2]](a, b)
            else:
                result = self._same(np.nan)
            self.values[match[1]] = result
        elif match := _CAST.match(line):
            self.values[match[1]] = self._value(match[2])
        elif match := _SELECT.match(line):
            condition, a, b = (self._value(match[i]) for i in (2, 3, 4))
            self.values[match[1]] = np.where(np.isnan(condition), np.nan, np.where(condition != 0, a, b))
        elif match := _PROGRAM.match(line):
            is_id = match[2] == "program_id"
            self.values[match[1]] = self.ids[match[3]].astype(float) if is_id else self._same(self.grid[match[3]])
        elif match := _READ.match(line):
            self.values[match[1]] = self._same(self.largest.get(match[2], np.nan))
        elif match := _DOT.search(line) or _TENSOR_MEMORY_DOT.search(line):
            m, k, n = (int(match[i]) for i in (1, 2, 3))
            layout = match.groupdict().get("layout")
            computed = m * n if layout is None else self.layouts[layout](m, n) if layout in self.layouts else 0
            into.flops += 2 * k * computed
            self.found.each = self.found.each + times * 2 * k * computed


def _layout(text: str) -> Callable[[int, int], int]:
    """Rows times columns that the warps of a layout compute for a tile of so many."""
    found = re.search(r"warpsPerCTA = \[(\d+), (\d+)\].*instrShape = \[(\d+), (\d+)", text)
    if found is None:
        raise Uncounted(f"products of an unknown layout: {text}")
    warps, shape = ([int(found[i]) for i in side] for side in ((1, 2), (3, 4)))

    def computed(rows: int, columns: int) -> int:
        sides = ((rows, warps[0] * shape[0]), (columns, warps[1] * shape[1]))
        return int(np.prod([-(-length // step) * step for length, step in sides]))

    return computed
