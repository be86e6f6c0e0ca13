"""Other launch settings than the shipped ones: what lies a step away from a given one."""

from collections.abc import Iterator
from typing import Any

# What may vary of each of the kernels' settings; the rest follows from the shape.
_TILE = ("rows", "columns", "depth", "num_warps", "num_stages")
_FIELDS = {
    "gemm": _TILE,
    "persistent_gemm": _TILE,
    "input_gradient": _TILE,
    "weight_gradient": _TILE,
    "patch_embed": _TILE,
    "image_gradient": _TILE,
    "patch_embed_weight_gradient": ("num_warps", "num_stages"),
    "mlp": ("rows", "columns", "num_warps", "num_stages"),
    "attention": ("queries", "keys", "num_warps", "num_stages"),
    "attention_backward": ("queries", "keys", "num_warps", "num_stages"),
    "readout": ("tokens", "num_warps"),
    "readout_backward": ("tokens", "num_warps"),
    "layer_norm_rows": ("rows", "warps"),
}
# Which kernel makes a product: these are answered by yes or no, and then by settings of that kernel.
_KERNELS = ("vendor", "persistent")
# The least and the most of each; 256 is also the longest side of what a tensor descriptor loads.
_BOUNDS = {
    "rows": (1, 256),
    "columns": (16, 256),
    "depth": (16, 128),
    "queries": (16, 128),
    "keys": (16, 128),
    "tokens": (16, 64),
    "num_warps": (2, 8),
    "warps": (2, 8),
    "num_stages": (1, 5),
}
_LEAST_ROWS_OF_A_DOT = 16


def tunable(asked: str) -> bool:
    """Whether `asked`, a function's name with its arguments, has other answers than the shipped one."""
    return _function(asked) in _FIELDS


def leads_elsewhere(asked: str) -> bool:
    """Whether `asked` is answered by yes or no, and then by settings of another kernel: the vendor's GEMM, or ours."""
    return _function(asked) in _KERNELS


def in_turn(questions: dict[str, Any]) -> list[tuple[str, Any]]:
    """Questions with their answers, from one launch, in the order in which they are tried.

    Which kernel it is comes last, when the one there is has its best settings; of such questions the last one that was
    asked comes first, since another answer to an earlier one leaves it out.
    """
    of_kernels = [question for question in questions.items() if leads_elsewhere(question[0])]
    return [question for question in questions.items() if question not in of_kernels] + of_kernels[::-1]


def kernels_chosen(settings: dict[str, Any]) -> list[str]:
    """Of the kernels that are not the usual one, those that these settings choose."""
    return sorted({_function(asked) for asked, answer in settings.items() if leads_elsewhere(asked) and answer})


def neighbours(asked: str, setting: Any) -> Iterator[object]:
    """Settings a step away: one size halved or doubled, alone or together with the warps, one stage more or less."""
    fields = _FIELDS[_function(asked)]
    if hasattr(setting, "_fields"):
        yield from _of_tile(setting, fields)
    elif hasattr(setting[0], "_fields"):
        # Several tiles, or a tile and what goes with it.
        for i, part in enumerate(setting):
            if hasattr(part, "_fields"):
                for other in _of_tile(part, fields):
                    yield (*setting[:i], other, *setting[i + 1 :])
    else:
        for i, name in enumerate(fields):
            for value in _steps(name, setting[i]):
                yield (*setting[:i], value, *setting[i + 1 :])


def _of_tile(tile: Any, fields: tuple[str, ...]) -> Iterator[object]:
    sizes = [name for name in fields if not name.startswith("num_")]
    warps = _steps("num_warps", tile.num_warps)
    for name in fields:
        for value in _steps(name, getattr(tile, name)):
            yield tile._replace(**{name: value})
    for name in sizes:
        for value in _steps(name, getattr(tile, name)):
            for count in warps:
                yield tile._replace(**{name: value, "num_warps": count})


def _steps(name: str, value: int) -> list[int]:
    least, most = _BOUNDS[name]
    if name == "rows" and value >= _LEAST_ROWS_OF_A_DOT:
        least = _LEAST_ROWS_OF_A_DOT
    steps = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
    return [step for step in steps if least <= step <= most]


def _function(asked: str) -> str:
    return asked.partition("(")[0]
