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
        and all(_torchs_or_pythons(name, value) for name, value in read.variables.items())
    )


def _torchs_or_pythons(name: str, value: Any) -> bool:
    home = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or ""
    return value is getattr(builtins, name, ()) or home.partition(".")[0] == "torch"


class State(NamedTuple):
    """Everything plain that a call reads beside its arguments, when it was looked at; whether it reads nothing else.

    Functions are plain: they are told by which they are.
    """

    attributes: dict[str, Any]
    variables: list[tuple[dict[str, Any], str, Any]]
    complete: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> "State":
        """Itself: a copied model reads the same globals."""
        return self

    def holds(self, module: Any) -> bool:
        """Whether all of it is as it was."""
        for name, value in self.attributes.items():
            if _attribute(module, name) != value:
                return False
        return all(variables.get(name) == value for variables, name, value in self.variables)


def _attribute(module: Any, name: str) -> Any:
    state = module.__dict__
    return state[name] if name in state else getattr(module._deit_fast_stock, name, None)


_PLAIN = (FunctionType, MethodType, property, bool, int, float, str, tuple, type(None))


def state_read(method: Any, module: Any) -> State:
    """What a call of `method`, of the class of a swapped `module`, reads: of the module, its class and globals.

    The methods and properties of the class that it reads are gone through too, and stand here themselves, as do the
    functions of the same file.
    """
    attributes: dict[str, Any] = {}
    variables: list[tuple[dict[str, Any], str, Any]] = []
    complete, waiting, seen = isinstance(method, FunctionType), [method], set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in seen:
            continue
        seen.add(function)
        read = read_by(function)
        for name in read.attributes - attributes.keys():
            value = _attribute(module, name)
            if isinstance(value, Tensor):
                continue  # what is in it changes values, not rows
            attributes[name] = value
            waiting.append(value.fget if isinstance(value, property) else getattr(value, "__func__", value))
            # A method put on the instance belongs to it: a copy can't call it.
            of_instance = name in module.__dict__ and callable(value)
            complete = complete and not of_instance and (isinstance(value, _PLAIN) or callable(value))
        for name, value in read.variables.items():
            if name not in function.__globals__ or isinstance(value, ModuleType):
                continue
            variables.append((function.__globals__, name, value))
            complete = complete and (isinstance(value, _PLAIN) or callable(value))
            if getattr(value, "__globals__", None) is function.__globals__:
                waiting.append(value)
    return State(attributes, variables, complete)
