"""An operator's launches, remembered by what its arguments look like, and made again without what led to them.

Most of what a call costs the host is finding out what the last call of the same shapes has found out: checks, tiles,
strides, and Triton's own specialisation. A launcher decides by the shapes, strides, dtypes, alignment and scalars that
it is given, never by values, so a plan, the memory it allocated and the kernels it launched, serves every call alike.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver

from deit_fast.kernels.launching import hardware, run, tuned
from deit_fast.kernels.launching.tf32 import matmul_precision

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")
# As CUDA's allocator aligns.
_ALIGNMENT = 512
# Shapes that an operator sees beyond these are rare enough to be worked out anew.
_MOST = 256
# Plans of one operator that may fail before it has none: by then the runner, not a shape, is the reason.
_MOST_FAILURES = 3
# A compiled kernel's `run` is Triton's own: its parameters were read in these releases.
_READ = ("3.6", "3.7", "3.8", "3.9")
RUNNER_IS_KNOWN = ".".join(triton.__version__.split(".")[:2]) in _READ
_enabled = True
_runtime = knobs.runtime


class Empty(NamedTuple):
    """Arguments of a plan's `allocate`."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class PlannedLaunch(NamedTuple):
    """One kernel. `arguments` picks them out of the plan's values; `compiled` holds what `start` starts."""

    compiled: Any  # Triton's CompiledKernel
    start: Callable[..., None]
    function: object
    metadata: object
    programs: int
    arguments: Callable[[list], tuple]


class Output(NamedTuple):
    """An allocated tensor by its number, or a view of one where `view` has its size, stride and offset."""

    allocated: int
    view: tuple | None


class Plan(NamedTuple):
    """A plan's values are addresses, then `constants`: of the tensors given, in their order, of those allocated for the
    result, of all other memory, in one piece, and of what lies `inside` these, each (which of them, bytes past it).
    """

    device: int
    allocate: Callable[..., Tensor]
    empties: tuple[Empty, ...]
    scratch: int  # bytes that no result is in
    inside: tuple[tuple[int, int], ...]
    constants: tuple
    launches: tuple[PlannedLaunch, ...]
    outputs: tuple[Output | None, ...]
    returns: Callable[[list], object]
    as_allocated: bool  # whether `outputs` are the tensors allocated, in their order

    def run(self, pointers: list[int]) -> object:
        allocate, allocated = self.allocate, []
        for size, stride, dtype in self.empties:
            tensor = allocate(size, stride, dtype)
            allocated.append(tensor)
            pointers.append(tensor.data_ptr())
        if self.scratch:
            scratch = allocate((self.scratch,), (1,), torch.uint8)
            pointers.append(scratch.data_ptr())
        stream = driver.active.get_current_stream(self.device)
        values = [*pointers, *[pointers[slot] + offset for slot, offset in self.inside], *self.constants]
        for _, start, function, metadata, programs, arguments in self.launches:
            start(programs, 1, 1, stream, function, metadata, None, None, None, *arguments(values))
        if self.as_allocated:
            return self.returns(allocated)
        return self.returns(
            [
                None
                if output is None
                else allocated[output.allocated]
                if output.view is None
                else allocated[output.allocated].as_strided(*output.view)
                for output in self.outputs
            ]
        )


class Replayed:
    """`launcher`, tensors in and tensors out, with its plans, and what was measured of it, by the same keys."""

    def __init__(self, name: str, launcher: Callable) -> None:
        self.name = name
        self.launcher = launcher
        self.failures = 0  # plans that did not run
        self.plans: dict[tuple | None, Plan | None] = {}  # asked for None too, of which there is never one
        self.choices: dict[tuple | None, tuned.Choice | None] = {}
        _all.add(self)

    def plan(self, lengths: tuple, flat: Sequence) -> tuple[Plan | None, tuple | None, list[int]]:
        """The plan, or None; what it is remembered by, or None where it can't be; the tensors' addresses.

        flat: the arguments, with the tensors of lists, of these `lengths`, in their place.
        """
        key, pointers = _key(lengths, flat)
        plan = self.plans.get(key)
        if plan is not None and (_hooked() or plan.device != driver.active.get_current_device()):
            plan = None
        return plan, key, pointers

    def drop(self, key: tuple | None, error: Exception) -> None:
        """The plan of `key` failed: this call is never planned again, and after a few of them no call is."""
        self.plans[key] = None
        self.failures += 1
        if self.failures == _MOST_FAILURES:
            self.plans.clear()
            warnings.warn(
                f"deit_fast.{self.name}: its launches could not be repeated for {_MOST_FAILURES} shapes (last: "
                f"{type(error).__name__}: {error}); Triton launches them anew at every call from here on",
                stacklevel=4,
            )

    def __call__(self, key: tuple | None, arguments: tuple) -> object:
        """Calls the launcher, and remembers what it did if that can be done again."""
        if key is None or key in self.plans or not self._plans_calls():
            return self.launcher(*arguments)
        with _Recorder() as recorder, run.recorded() as launches:
            result = self.launcher(*arguments)
        if any(each.compiled is None for each in launches):
            return result
        if len(self.plans) >= _MOST:
            self.plans.clear()
            self.choices.clear()
        self.plans[key] = None if recorder.opaque else _planned(arguments, recorder.allocated, launches, result)
        return result

    def _plans_calls(self) -> bool:
        if not _enabled or hardware.interpreted() or self.failures >= _MOST_FAILURES:
            return False
        if not RUNNER_IS_KNOWN:
            _say_runner_is_unknown()
        return RUNNER_IS_KNOWN


_all: weakref.WeakSet[Replayed] = weakref.WeakSet()


def forget() -> None:
    """Drops every plan: the device, or a table of settings, is another one now."""
    for replayed in _all:
        replayed.plans.clear()
        replayed.choices.clear()
        replayed.failures = 0


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Whether, within the block, calls are made again from plans; all there are at its start are forgotten."""
    global _enabled
    forget()
    previous, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = previous
        forget()


@cache
def _say_runner_is_unknown() -> None:
    warnings.warn(
        f"deit_fast: how Triton {triton.__version__} runs a compiled kernel is not known (known: {', '.join(_READ)}); "
        f"Triton launches each kernel itself, which takes the host longer",
        stacklevel=6,
    )


def _hooked() -> bool:
    """Whether a profiler wants to see Triton's launches with their metadata."""
    hook = _runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def _key(lengths: tuple, flat: Sequence) -> tuple[tuple | None, list[int]]:
    """What launchers decide by, None where a subclass of Tensor may decide otherwise; the tensors' addresses.

    Asked at every call, so it is written to be quick.
    """
    key: list = [matmul_precision(), tuned.is_enabled(), lengths]
    pointers: list[int] = []
    for argument in flat:
        kind = type(argument)
        if kind is Parameter or kind is Tensor:
            pointer = argument.data_ptr()
            pointers.append(pointer)
            # Triton compiles for addresses that divide by 16 or don't.
            if argument.is_contiguous() and not pointer & 15:
                key += (argument.shape, argument.dtype, argument.get_device())
            else:
                key += (argument.shape, argument.dtype, argument.get_device(), argument.stride(), not pointer & 15)
        elif kind is list:
            key.append(tuple(argument))
        elif isinstance(argument, Tensor):
            return None, pointers
        else:
            key.append(argument)
    # A tensor given twice is another call than two of the same shape.
    if len(set(pointers)) < len(pointers):
        key.append(tuple(map(pointers.index, pointers)))
    return tuple(key), pointers


class _Recorder(TorchDispatchMode):
    """What is allocated, in order; `opaque` once an operator other than an allocation or a view has run."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[Tensor] = []
        self.opaque = False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if func._schema.name in _ALLOCATIONS:
            self.allocated.append(result)
        elif not func.is_view:
            # `promote_types` and the like compute no tensor.
            self.opaque |= func._schema.is_mutable or any(isinstance(leaf, Tensor) for leaf in tree_leaves(result))
        return result


def _planned(arguments: tuple, allocated: list[Tensor], launches: list[run.Recorded], result: object) -> Plan | None:
    """None where a tensor is not one of those given or allocated, or lies in several of them."""
    given = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    tensors: list[Any] = list(result) if isinstance(result, (list, tuple)) else [result]
    storages = {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
    results = [tensor for tensor in allocated if tensor.untyped_storage()._cdata in storages]
    rest = [tensor for tensor in allocated if tensor.untyped_storage()._cdata not in storages]
    slots, bases = [*given, *results, *rest], [0]
    for tensor in rest:
        bases.append(bases[-1] + -(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT)
    first_of_rest = len(given) + len(results)
    scratch = max(bases[-1], 1) if rest else 0

    inside: dict[tuple[int, int], int] = {}
    constants: list = []
    picked: list[list[tuple[str, int]]] = []
    for _, _, arguments_, _ in launches:
        places = []
        for argument in arguments_:
            if not isinstance(argument, Tensor):
                places.append(("constant", len(constants)))
                constants.append(argument)
                continue
            place = _place(argument, slots)
            if place is None:
                return None
            slot, offset = place
            if slot >= first_of_rest:
                slot, offset = first_of_rest, offset + bases[slot - first_of_rest]
            if offset == 0:
                places.append(("slot", slot))
            else:
                places.append(("inside", inside.setdefault((slot, offset), len(inside))))
        picked.append(places)
    first = {"slot": 0, "inside": first_of_rest + bool(scratch)}
    first["constant"] = first["inside"] + len(inside)
    found = [
        PlannedLaunch(
            compiled,
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            programs,
            itemgetter(*(first[kind] + index for kind, index in places)),
        )
        for (compiled, programs, _, _), places in zip(launches, picked, strict=True)
    ]

    outputs = [None if tensor is None else _output(tensor, results) for tensor in tensors]
    if not found or any(output is None for output, tensor in zip(outputs, tensors, strict=True) if tensor is not None):
        return None
    collected: dict[type, Callable[[list], object]] = {list: list, tuple: tuple}
    returns = collected.get(type(result), _only)
    empties = tuple(Empty(tuple(t.shape), t.stride(), t.dtype) for t in results)
    as_allocated = outputs == [Output(i, None) for i in range(len(empties))]
    return Plan(
        launches[0].device,
        _allocator(given[0].device),
        empties,
        scratch,
        tuple(inside),
        tuple(constants),
        tuple(found),
        tuple(outputs),
        returns,
        as_allocated,
    )


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """`empty_strided` of size, stride and dtype on `device`, the current one: by what Inductor's code calls, past the
    dispatcher and in half the time, where PyTorch has that.
    """
    quick = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    return quick or (lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device=device))


def _only(tensors: list) -> object:
    return tensors[0]


def _place(tensor: Tensor, slots: list[Tensor]) -> tuple[int, int] | None:
    """Slot and bytes past its pointer."""
    pointer = tensor.data_ptr()
    for slot, candidate in enumerate(slots):
        if candidate.data_ptr() == pointer:
            return slot, 0
    inside = [
        (slot, pointer - candidate.data_ptr())
        for slot, candidate in enumerate(slots)
        if candidate.data_ptr() <= pointer < candidate.data_ptr() + _extent(candidate)
    ]
    return inside[0] if len(inside) == 1 else None


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _output(tensor: Tensor, allocated: list[Tensor]) -> Output | None:
    for index, candidate in enumerate(allocated):
        if candidate.untyped_storage()._cdata == tensor.untyped_storage()._cdata and candidate.dtype == tensor.dtype:
            same = candidate.shape == tensor.shape and candidate.stride() == tensor.stride()
            view = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            return Output(index, None if same and tensor.storage_offset() == 0 else view)
    return None
