"""How a stock form declares an operator's arguments, and what is read from that."""

import inspect
from collections.abc import Callable
from enum import Enum
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from torch import Tensor
from torch.library import infer_schema

from deit_fast.kernels.launching.tuned import Argument


class Role(Enum):
    PER_SAMPLE = "a tensor with a row for each sample, [B, ...]"
    SHARED = "a tensor that all samples share"
    FREE = "a number that launch settings do not depend on"


# How a stock form declares its arguments. Measured settings (`deit-fast tune`) are kept by shape and batch, so every
# tensor says which it has. Numbers count as part of the shape, but for floats and what is free.
PerSample = Annotated[Tensor, Role.PER_SAMPLE]
Shared = Annotated[Tensor, Role.SHARED]
FreeInt = Annotated[int, Role.FREE]


def declared(name: str, stock: Callable) -> tuple[Argument, ...]:
    """The arguments of `stock`, from its annotations.

    Raises:
        TypeError: a tensor that doesn't say whether it is `PerSample` or `Shared`.
    """
    found = []
    hints = get_type_hints(stock, include_extras=True)
    for parameter in inspect.signature(stock).parameters:
        kinds, roles, is_list = _kinds_and_roles(hints[parameter])
        if Tensor in kinds and not roles & {Role.PER_SAMPLE, Role.SHARED}:
            raise TypeError(
                f"deit_fast.{name}: {parameter} must be declared PerSample or Shared, is {hints[parameter]}"
            )
        keyed = float not in kinds and Role.FREE not in roles
        found.append(Argument(parameter, Tensor in kinds, is_list and Tensor in kinds, Role.PER_SAMPLE in roles, keyed))
    return tuple(found)


def _kinds_and_roles(hint: Any) -> tuple[set[type], set[Role], bool]:
    """The types in a hint, what `Annotated` says of them, and whether it is a list."""
    if get_origin(hint) is Annotated:
        kind, *roles = get_args(hint)
        return {kind}, set(roles), False
    inner = get_args(hint)
    if not inner:
        return {hint}, set(), False
    kinds: set[type] = set()
    found: set[Role] = set()
    for each in inner:
        more_kinds, more_roles, _ = _kinds_and_roles(each)
        kinds |= more_kinds
        found |= more_roles
    return kinds, found, get_origin(hint) is list


def schema(stock: Callable) -> str:
    """PyTorch's, from `stock`'s types without what is annotated to them."""
    hints = get_type_hints(stock)
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[name])
        for name in inspect.signature(stock).parameters
    ]

    def typed() -> None: ...

    typed.__signature__ = inspect.Signature(parameters, return_annotation=hints["return"])  # type: ignore[attr-defined]
    return infer_schema(typed, mutates_args=())
