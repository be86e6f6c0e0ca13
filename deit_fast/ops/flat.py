"""An operator's arguments laid flat, each list's tensors in its place, and gathered again.

PyTorch's autograd sees tensors, not lists of them. Each way is asked at every call, so it is one expression of the
arguments' names, for lists of certain lengths (`expressions`).
"""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

from deit_fast.kernels.launching.expressions import function, tuple_of
from deit_fast.kernels.launching.tuned import Argument


class Layout(NamedTuple):
    """Of flat arguments whose lists have certain `lengths`.

    gather: from flat arguments, all of them with their lists. saved, numbers: from flat arguments, those that are saved
    for backward, and those that are no tensors. restored: from the saved and the numbers, all arguments, None for the
    others. needs: from a flag for the layout and for each flat argument, the flags of the tensors that may have a
    gradient. gradients: from these gradients, one for the layout and for each flat argument, or None.
    """

    lengths: tuple[int, ...]
    gather: Callable[..., tuple]
    saved: Callable[..., tuple]
    saved_count: int
    numbers: Callable[..., tuple]
    restored: Callable[..., Any]
    needs: Callable[..., tuple[bool, ...]]
    gradients: Callable[..., tuple]
    gradients_count: int


def flattening(arguments: Sequence[Argument]) -> Callable[..., tuple[tuple[int, ...], tuple]]:
    """From all arguments: the lengths of the lists of tensors, and the flat arguments."""
    names = [argument.name for argument in arguments]
    lengths = tuple_of(f"len({argument.name})" for argument in arguments if argument.tensors)
    flat = tuple_of(f"*{argument.name}" if argument.tensors else argument.name for argument in arguments)
    return function(names, f"{lengths}, {flat}")


def layout(
    arguments: Sequence[Argument],
    lengths: tuple[int, ...],
    saves: Container[str],
    data: Container[str],
    make: Callable[[tuple], Any],
) -> Layout:
    """saves, data: names of the arguments that are saved for backward, and that have no gradient.

    make: of all arguments, what `Layout.restored` returns.
    """
    remaining = iter(lengths)
    # Of each argument, its variables: one, or one for each tensor of a list.
    variables = [
        [f"{argument.name}_{i}" for i in range(next(remaining))] if argument.tensors else [argument.name]
        for argument in arguments
    ]
    pairs = list(zip(arguments, variables, strict=True))

    def flat(wanted: Callable[[Argument], bool]) -> list[str]:
        return [each for argument, names in pairs if wanted(argument) for each in names]

    def gathered(known: Sequence[str]) -> str:
        """All arguments, of the variables that are `known`."""
        return tuple_of(
            "None" if not set(names) <= set(known) else f"[{', '.join(names)}]" if argument.tensors else names[0]
            for argument, names in pairs
        )

    everything = flat(lambda argument: True)
    saved = flat(lambda argument: argument.name in saves)
    numbers = flat(lambda argument: not argument.tensor)
    differentiable = flat(lambda argument: argument.tensor and argument.name not in data)
    return Layout(
        lengths,
        function(everything, gathered(everything)),
        function(everything, tuple_of(saved)),
        len(saved),
        function(everything, tuple_of(numbers)),
        function([*saved, *numbers], f"make({gathered([*saved, *numbers])})", make=make),
        function(["_", *everything], tuple_of(differentiable)),
        function(differentiable, tuple_of(["None", *(n if n in differentiable else "None" for n in everything)])),
        len(differentiable),
    )
