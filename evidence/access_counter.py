"""Counts what kernels load and store in Triton's interpreter: element by element, masked lanes left out.

    with counting(tokens=batch * 198) as counts:
        block(x).sum().backward()       # tensors on the CPU, the Triton backend forced

An operator call that reaches the dispatcher is a `CountedCall`, a kernel that it launches a `CountedLaunch`, a tensor
that the kernel is given an `Access`. Needs a process with TRITON_INTERPRET.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from evidence.traffic import ALLOCATIONS, address, distinct, distinct_bytes, is_view, read

_NOBODY = -1


@dataclass(frozen=True)
class Access:
    """What one launch does to one tensor, in bytes. distinct: each of the tensor's bytes once. size: the tensor's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    size: int
    loaded: int
    distinct_loaded: int
    stored: int
    distinct_stored: int


@dataclass
class CountedLaunch:
    """arguments: by name, without the tensors."""

    kernel: str
    arguments: dict[str, object]
    accesses: list[Access] = field(default_factory=list)


@dataclass
class Moved:
    """Bytes of one call. boundary: of its distinct inputs and outputs, as `evidence.traffic` counts them.

    The rest is what its launches move, each byte of a tensor once a launch: `once` is what the bytes of inputs and
    outputs cost the first time, `again` what further launches add that read them too, `between` what passes only
    from one launch of the call to the next.
    """

    boundary: int = 0
    once: int = 0
    again: int = 0
    between: int = 0

    @property
    def total(self) -> int:
        return self.once + self.again + self.between


@dataclass
class CountedCall:
    """One operator call. stock: the PyTorch operators that it ran inside, beside its launches.

    tokens: tensors that grow with the number of tokens; weights: all else, with gradients and partial sums.
    """

    operator: str
    launches: list[CountedLaunch] = field(default_factory=list)
    stock: Counter[str] = field(default_factory=Counter)
    tokens: Moved = field(default_factory=Moved)
    weights: Moved = field(default_factory=Moved)


class _Memory:
    """One storage during one call, and its elements during one launch: whose they are, how often they are used."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()  # kept, lest its address be used again
        self.start = self.storage.data_ptr()
        self.itemsize = tensor.element_size()
        self.length = self.storage.nbytes() // self.itemsize
        self.touched = np.zeros(self.length, bool)
        self.moved = 0
        self.begin_launch()

    def begin_launch(self) -> None:
        self.owner = np.full(self.length, _NOBODY, np.int8)
        self.loads, self.stores = (np.zeros(self.length, np.int32) for _ in range(2))

    def give(self, tensor: Tensor, number: int) -> None:
        """The tensor's elements to argument `number` of the launch."""
        if tensor.element_size() != self.itemsize:
            raise NotImplementedError("one call sees one memory in element sizes that differ")
        # An expanded tensor's elements once.
        shape = [1 if stride == 0 else size for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        elements = torch.from_numpy(self.owner).as_strided(shape, tensor.stride(), tensor.storage_offset())
        if (elements != _NOBODY).any():
            raise NotImplementedError("two arguments of one launch share elements: whose is a load?")
        elements.fill_(number)

    def holds(self, addresses: np.ndarray) -> bool:
        return self.start <= addresses.min() and addresses.max() < self.start + self.length * self.itemsize

    def count(self, addresses: np.ndarray, kind: str) -> None:
        np.add.at(getattr(self, kind), (addresses - self.start) // self.itemsize, 1)

    def access(self, name: str, tensor: Tensor, number: int) -> Access:
        loads, stores = (counts[self.owner == number] for counts in (self.loads, self.stores))
        return Access(
            name,
            tuple(tensor.shape),
            tensor.dtype,
            distinct_bytes(tensor),
            int(loads.sum()) * self.itemsize,
            int(np.count_nonzero(loads)) * self.itemsize,
            int(stores.sum()) * self.itemsize,
            int(np.count_nonzero(stores)) * self.itemsize,
        )

    def end_launch(self) -> None:
        self.touched |= (self.loads > 0) | (self.stores > 0)
        self.moved += int(np.count_nonzero(self.loads) + np.count_nonzero(self.stores)) * self.itemsize


class Counts:
    """calls: in order, views and allocations left out."""

    def __init__(self, tokens: int, execute: bool) -> None:
        self.calls: list[CountedCall] = []
        self._tokens = tokens
        self._execute = execute
        self._call: CountedCall | None = None
        self._of_call: dict[int, _Memory] = {}
        self._of_launch: list[_Memory] = []
        # By address: the storage, kept as in _Memory; who wrote it first; how often each element was written.
        self._written: dict[int, tuple[torch.UntypedStorage, str, np.ndarray]] = {}

    @property
    def not_written_once(self) -> list[str]:
        """What kernels wrote, but some of its elements never or more than once.

        Where a launch loads what it stored, to store there again, that was scratch and the last time counts.
        """
        return [
            f"{who}: elements written {counts.min()} to {counts.max()} times"
            for _, who, counts in self._written.values()
            if counts.min() != 1 or counts.max() != 1
        ]

    def run_call(self, function, args, kwargs):
        """An operator call as it reaches the dispatcher."""
        call = self._call = CountedCall(function._schema.name)
        self._of_call = {}
        ours = function.namespace == "deit_fast"
        if ours:
            # Past the mode, which would be off within.
            with _Dispatched(self.run_inside):
                result = function._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        else:
            result = function(*args, **kwargs)
        self._call = None
        boundary = _at_boundary(function, args, kwargs, result)
        if not boundary:
            return result
        self.calls.append(call)
        for tensor in boundary:
            moved = self._kind(call, tensor.numel())
            moved.boundary += distinct_bytes(tensor)
            moved.once += 0 if ours else distinct_bytes(tensor)
        addresses = {address(tensor) for tensor in boundary}
        for memory in self._of_call.values():
            moved = self._kind(call, memory.length)
            if memory.start in addresses:
                once = int(np.count_nonzero(memory.touched)) * memory.itemsize
                moved.once += once
                moved.again += memory.moved - once
            else:
                moved.between += memory.moved
        return result

    def run_inside(self, function, args, kwargs):
        """A PyTorch operator that one of ours runs inside: its bytes count as moved between launches."""
        result = function(*args, **kwargs)
        boundary = _at_boundary(function, args, kwargs, result)
        if boundary:
            self._call.stock[function._schema.name] += 1
        for tensor in boundary:
            self._kind(self._call, tensor.numel()).between += distinct_bytes(tensor)
        return result

    def _kind(self, call: CountedCall, elements: int) -> Moved:
        return call.tokens if elements % self._tokens == 0 else call.weights

    def run_launch(self, executor: GridExecutor, stock, args, kwargs) -> None:
        given = dict(zip(executor.arg_names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        # No tensor is kept: autograd copies a gradient that is also held elsewhere.
        launch = CountedLaunch(
            executor.fn.__name__, {name: given[name] for name in executor.arg_names if name not in tensors}
        )
        if self._call is None:
            self.calls.append(CountedCall(f"no operator, {launch.kernel}"))
            self._of_call = {}
        (self._call or self.calls[-1]).launches.append(launch)
        for tensor in tensors.values():
            if address(tensor) not in self._of_call:
                self._of_call[address(tensor)] = _Memory(tensor)
        memories = [self._of_call[address(tensor)] for tensor in tensors.values()]
        self._of_launch = distinct_memories = list(dict.fromkeys(memories))
        for memory in distinct_memories:
            memory.begin_launch()
        for number, (tensor, memory) in enumerate(zip(tensors.values(), memories, strict=True)):
            memory.give(tensor, number)
        if self._execute:
            stock(executor, *args, **kwargs)
        else:
            for memory in distinct_memories:
                memory.loads[memory.owner != _NOBODY] = 1
        for number, ((name, tensor), memory) in enumerate(zip(tensors.items(), memories, strict=True)):
            launch.accesses.append(memory.access(name.removesuffix("_ptr"), tensor, number))
        for memory in distinct_memories:
            memory.end_launch()
            if memory.stores.any():
                unwritten = memory.storage, launch.kernel, np.zeros(memory.length, np.int32)
                scratch = np.minimum(memory.loads, np.maximum(memory.stores - 1, 0))
                self._written.setdefault(memory.start, unwritten)[2][:] += memory.stores - scratch

    def count(self, pointers: np.ndarray, mask: np.ndarray, kind: str) -> None:
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        if not addresses.size:
            return
        for memory in self._of_launch:
            if memory.holds(addresses):
                memory.count(addresses, kind)
                return
        raise IndexError(f"{kind} outside the kernel's tensors, at {addresses.min():#x} to {addresses.max():#x}")


def _at_boundary(function, args, kwargs, result) -> list[Tensor]:
    """Distinct inputs, then distinct outputs; none where it is free."""
    inputs, outputs = read(function, args, kwargs), [t for t in tree_leaves(result) if isinstance(t, Tensor)]
    if is_view(function, inputs, outputs) or function._schema.name in ALLOCATIONS:
        return []
    return distinct(inputs) + distinct(outputs)


class _Dispatched(TorchDispatchMode):
    def __init__(self, run) -> None:
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self._run(func, args, kwargs or {})


@contextmanager
def counting(tokens: int, execute: bool = True) -> Iterator[Counts]:
    """Counts the operator calls and launches within the block.

    tokens: of the whole batch. A tensor grows with them if its elements are a multiple of their number: choose one
    that no weight's elements are a multiple of.
    execute: without, kernels are not run, outputs are whatever memory they were given, and every tensor of a
    launch counts as loaded once: the same distinct bytes, if kernels use all they are given.
    """
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is not set: kernels would be compiled, not interpreted; set it to 1")
    counts = Counts(tokens, execute)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    stock_launch = GridExecutor.__call__

    def counted_load(builder, pointers, mask, *rest):
        counts.count(pointers.data, mask.data, "loads")
        return load(builder, pointers, mask, *rest)

    def counted_store(builder, pointers, value, mask, *rest):
        counts.count(pointers.data, mask.data, "stores")
        return store(builder, pointers, value, mask, *rest)

    def launch(executor, *args, **kwargs):
        with torch._C._DisableTorchDispatch():  # what the interpreter itself does with tensors is not the operator's
            counts.run_launch(executor, stock_launch, args, kwargs)

    def refused(*_):
        raise NotImplementedError("an atomic operation: the order of its sums, and so their bits, would change")

    with (
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", refused),
        mock.patch.object(InterpreterBuilder, "create_atomic_cas", refused),
        mock.patch.object(GridExecutor, "__call__", launch),
        _Dispatched(counts.run_call),
    ):
        yield counts
