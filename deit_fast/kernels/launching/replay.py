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
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs
from triton.runtime import driver

from deit_fast.kernels.launching import hardware, memory, run, tuned
from deit_fast.kernels.launching.expressions import function, tuple_of
from deit_fast.kernels.launching.keys import key_and_pointers

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


class Plan(NamedTuple):
    """run: makes the result, from the addresses of the tensors given, in their order. compiled: what it starts."""

    device: int
    run: Callable[..., object]
    compiled: tuple  # of Triton's CompiledKernel


class Replayed:
    """`launcher`, tensors in and tensors out, with its plans, and what was measured of it, by the same keys."""

    def __init__(self, name: str, launcher: Callable) -> None:
        self.name = name
        self.launcher = launcher
        self.failures = 0  # plans that did not run
        self.plans: dict[tuple | None, Plan | None] = {}  # asked for None too, of which there is never one
        self.choices: dict[tuple | None, tuned.Choice | None] = {}
        _all.add(self)

    def plan(self, lengths: tuple[int, ...], flat: tuple) -> tuple[Plan | None, tuple | None, list[int]]:
        """The plan, or None; what it is remembered by, or None where it can't be; the tensors' addresses.

        flat: the arguments, with the tensors of lists, of these `lengths`, in their place.
        """
        key, pointers = key_and_pointers(lengths, flat)
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
        if key is None or key in self.plans or not self.plans_calls():
            return self.launcher(*arguments)
        with _Recorder() as recorder, run.recorded() as launches:
            result = self.launcher(*arguments)
        if any(each.compiled is None for each in launches):
            return result
        self.remember(key, None if recorder.opaque else _planned(arguments, recorder.allocated, launches, result))
        return result

    def remember(self, key: tuple, plan: Plan | None) -> None:
        """None: calls of this key are never planned again."""
        if len(self.plans) >= _MOST:
            self.plans.clear()
            self.choices.clear()
        self.plans[key] = plan

    def plans_calls(self) -> bool:
        """Whether plans are made at all, now and with this Triton."""
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
    """None where a tensor is not one of those given or allocated, or lies in several of them.

    A plan is one expression (`expressions`): it allocates what the result is made of, then all other memory in one
    piece, starts the kernels, and puts the result together.
    """
    given = [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]
    tensors: list[Any] = list(result) if isinstance(result, (list, tuple)) else [result]
    storages = {tensor.untyped_storage()._cdata for tensor in tensors if tensor is not None}
    results = [tensor for tensor in allocated if tensor.untyped_storage()._cdata in storages]
    rest = [tensor for tensor in allocated if tensor.untyped_storage()._cdata not in storages]
    outputs = ["None" if tensor is None else _output(tensor, results) for tensor in tensors]
    if not launches or None in outputs:
        return None

    device = launches[0].device
    names: dict[str, Any] = {"driver": driver, "allocate": memory.allocator(given[0].device)}
    parameters = [f"given_{i}" for i in range(len(given))]
    addresses, steps = list(parameters), []
    for i, tensor in enumerate(results):
        names[f"empty_{i}"] = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        steps += [f"result_{i} := allocate(*empty_{i})", f"address_{i} := result_{i}.data_ptr()"]
        addresses.append(f"address_{i}")
    size = 0
    for tensor in rest:
        addresses.append(f"scratch_address + {size}")
        size += -(-_extent(tensor) // _ALIGNMENT) * _ALIGNMENT
    if rest:
        names["scratch_empty"] = ((max(size, 1),), (1,), torch.uint8)
        steps += ["scratch := allocate(*scratch_empty)", "scratch_address := scratch.data_ptr()"]
    steps.append(f"stream := driver.active.get_current_stream({device})")
    for i, (compiled, programs, values, _) in enumerate(launches):
        passed = []
        for j, value in enumerate(values):
            if isinstance(value, Tensor):
                place = _place(value, [*given, *results, *rest])
                if place is None:
                    return None
                slot, offset = place
                passed.append(f"{addresses[slot]} + {offset}" if offset else addresses[slot])
            else:
                names[f"value_{i}_{j}"] = value
                passed.append(f"value_{i}_{j}")
        takes_scratch = getattr(compiled.metadata, "global_scratch_size", 0)  # 3.6's of AMD GPUs don't say
        names[f"start_{i}"] = memory.with_scratch(compiled.run) if takes_scratch else compiled.run
        names[f"kernel_{i}"] = compiled.function, compiled.packed_metadata, None, None, None
        steps.append(f"start_{i}({programs}, 1, 1, stream, *kernel_{i}, {', '.join(passed)})")
    together: dict[type, str] = {list: "[{}]", tuple: "({},)"}
    steps.append(together.get(type(result), "{}").format(", ".join(map(str, outputs))))
    plan = function(parameters, f"{tuple_of(steps)}[-1]", **names)
    return Plan(device, plan, tuple(each.compiled for each in launches))


def _place(tensor: Tensor, slots: list[Tensor]) -> tuple[int, int] | None:
    """Which of `slots` the tensor lies in, and bytes past its pointer; None where that is no slot or several."""
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


def _output(tensor: Tensor, results: list[Tensor]) -> str | None:
    """`tensor` as an expression of the plan's results."""
    for i, candidate in enumerate(results):
        if candidate.untyped_storage()._cdata == tensor.untyped_storage()._cdata and candidate.dtype == tensor.dtype:
            same = candidate.shape == tensor.shape and candidate.stride() == tensor.stride()
            if same and tensor.storage_offset() == 0:
                return f"result_{i}"
            return f"result_{i}.as_strided({tuple(tensor.shape)}, {tensor.stride()}, {tensor.storage_offset()})"
    return None
