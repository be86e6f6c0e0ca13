"""What a function that is not ours to know reads, from its byte code: whatever else may change behind it."""

import builtins
import dis
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_WRITES = {"STORE_ATTR", "STORE_GLOBAL", "STORE_DEREF", "DELETE_ATTR", "IMPORT_NAME"}


class Read(NamedTuple):
    """By one function: names of attributes, of whatever they are; globals and free variables, by name."""

    attributes: frozenset[str]
    variables: dict[str, Any]
    # It only computes: no jumps, nothing stored but in local variables.
    straight: bool


def read_by(function: FunctionType) -> Read:
    """What `function` reads, in comprehensions and nested functions too."""
    attributes: set[str] = set()
    variables = dict(
        zip(function.__code__.co_freevars, (each.cell_contents for each in function.__closure__ or ()), strict=True)
    )
    straight = True
    for code in _nested(function.__code__):
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname in _ATTRIBUTES:
                attributes.add(name)
            elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                variables[name] = function.__globals__.get(name, getattr(builtins, name, None))
            elif instruction.opname in _WRITES or instruction.opcode in (*dis.hasjrel, *dis.hasjabs):
                straight = False
    return Read(frozenset(attributes), variables, straight)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def only_computes(function: Callable, attributes: set[str]) -> bool:
    """Whether the result hangs on the arguments and these attributes of them alone, with one way through the code.

    Beside them it may read what every tensor has, and torch.
    """
    if not isinstance(function, FunctionType):
        return False
    read = read_by(function)
    libraries = (Tensor, torch, F)
    return (
        read.straight
        and all(name in attributes or any(hasattr(each, name) for each in libraries) for name in read.attributes)
        and all(_torchs_own(value) for value in read.variables.values())
    )


def _torchs_own(value: Any) -> bool:
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    return callable(getattr(builtins, getattr(value, "__name__", ""), None)) or home.partition(".")[0] == "torch"


class State(NamedTuple):
    """Everything plain that a call reads beside its arguments, when it was looked at; whether it reads nothing else."""

    attributes: dict[str, Any]
    variables: list[tuple[dict[str, Any], str, Any]]
    complete: bool

    def holds(self, module: Any) -> bool:
        """Whether all of it is as it was."""
        for name, value in self.attributes.items():
            if _attribute(module, name) != value:
                return False
        return all(variables.get(name) == value for variables, name, value in self.variables)


def _attribute(module: Any, name: str) -> Any:
    state = module.__dict__
    value = state[name] if name in state else getattr(module._deit_fast_stock, name, None)
    # Tensors and modules are asked about by those who compute with them.
    return value if isinstance(value, _PLAIN) else None


_PLAIN = (FunctionType, MethodType, bool, int, float, str, tuple)


def state_read(method: Any, module: Any) -> State:
    """What a call of `method`, of the class of a swapped `module`, reads: of the module, its class and globals.

    The methods of the class that it calls are gone through too, and stand here themselves.
    """
    attributes: dict[str, Any] = {}
    variables: list[tuple[dict[str, Any], str, Any]] = []
    complete, waiting = isinstance(method, FunctionType), [method]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType):
            continue
        read = read_by(function)
        for name in read.attributes - attributes.keys():
            attributes[name] = value = _attribute(module, name)
            waiting.append(value)
            # A method put on the instance belongs to it: a copy can't call it.
            complete = complete and not (name in module.__dict__ and callable(value))
        for name, value in read.variables.items():
            if name in function.__globals__ and not (isinstance(value, (ModuleType, type)) or callable(value)):
                variables.append((function.__globals__, name, value))
                complete = complete and isinstance(value, _PLAIN)
    return State(attributes, variables, complete)
