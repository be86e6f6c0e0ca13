"""What an operator's launches are remembered by: all that launchers decide by of their arguments."""

from collections.abc import Callable
from functools import cache

from torch import Tensor
from torch.nn import Parameter

from deit_fast.kernels.launching import tuned
from deit_fast.kernels.launching.expressions import function, tuple_of
from deit_fast.kernels.launching.tf32 import matmul_precision

# Triton compiles for addresses that divide by 16 or don't.
_ALIGNMENT = 16
_PLAIN = (Tensor, Parameter)


def key_and_pointers(lengths: tuple[int, ...], flat: tuple) -> tuple[tuple | None, list[int]]:
    """The key, None where a subclass of Tensor may decide otherwise; the tensors' addresses, in their order.

    lengths, flat: arguments with the tensors of lists, of these lengths, in their places.
    """
    kinds = tuple(map(type, flat))
    described, pointers, is_plain = _reader(kinds)(*flat)
    if is_plain:
        return (matmul_precision(), tuned.is_enabled(), lengths, kinds, described), pointers
    if any(isinstance(argument, Tensor) and type(argument) not in _PLAIN for argument in flat):
        return None, pointers
    tensors = [argument for argument in flat if isinstance(argument, Tensor)]
    layouts = tuple((tensor.stride(), tensor.data_ptr() % _ALIGNMENT == 0) for tensor in tensors)
    # A tensor given twice is another call than two of the same shape.
    first = tuple(map(pointers.index, pointers))
    return (matmul_precision(), tuned.is_enabled(), lengths, kinds, described, layouts, first), pointers


@cache
def _reader(kinds: tuple[type, ...]) -> Callable[..., tuple[tuple, list[int], bool]]:
    """From flat arguments of these types: what is seen of each, the tensors' addresses, and whether that says it all.

    It does where all tensors are contiguous, aligned, distinct, and of no subclass. Asked at every call, so it is one
    expression (`expressions`).
    """
    names = [f"a{i}" for i in range(len(kinds))]
    tensors = [name for name, kind in zip(names, kinds, strict=True) if issubclass(kind, Tensor)]
    seen = [
        f"{name}.shape, {name}.dtype, {name}.get_device()"
        if issubclass(kind, Tensor)
        else f"tuple({name})"
        if kind is list
        else name
        for name, kind in zip(names, kinds, strict=True)
    ]
    pointers = [f"{name}_pointer" for name in tensors]
    addresses = ", ".join(f"({p} := {name}.data_ptr())" for p, name in zip(pointers, tensors, strict=True))
    if all(kind in _PLAIN or not issubclass(kind, Tensor) for kind in kinds):
        conditions = [f"{name}.is_contiguous()" for name in tensors]
        aligned = f"not ({' | '.join(pointers) or 0}) & {_ALIGNMENT - 1}"
        distinct = f"len({{{', '.join(pointers)}}}) == {len(pointers)}"
        is_plain = " and ".join([*conditions, aligned, distinct])
    else:
        is_plain = "False"
    return function(names, f"{tuple_of(seen)}, [{addresses}], {is_plain}")
