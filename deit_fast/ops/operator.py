"""One declaration an operator, and what PyTorch's dispatcher needs made of it.

A subclass of `Operator` declares all there is to know of one operator: its stock form, whose types are its schema, the
launcher of its kernels, what autocast casts, what backward needs, its FLOPs and examples of its arguments. Its one
instance is what `deit_fast.ops` calls, and what `deit-fast check`, `bench` and `tune` and the tests go through.
"""

import sys
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from deit_fast.kernels.launching.replay import Replayed
from deit_fast.ops import backend
from deit_fast.ops.arguments import declared, schema
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flat import Layout, flattening, layout
from deit_fast.ops.route import route

_LIBRARY = torch.library.Library("deit_fast", "DEF")
_AUTOCAST_KEYS = {
    "cpu": torch._C.DispatchKey.AutocastCPU,
    "cuda": torch._C.DispatchKey.AutocastCUDA,
}
_AUTOCAST_KEY_SETS = {device_type: torch._C.DispatchKeySet(key) for device_type, key in _AUTOCAST_KEYS.items()}

_VMAP_KEY: Any = torch._C._parse_dispatch_key("VmapMode")
# Whether it is within `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own.
batches_gradients = partial(torch._C._dispatch_tls_is_dispatch_key_included, _VMAP_KEY)

OPERATORS: "dict[str, Operator]" = {}


def _keep_whole_in_inductor(op: Any) -> None:
    """Inductor makes its table of decompositions of export's, and refuses to call an operator that stands there."""
    inductor = sys.modules.get("torch._inductor.decomposition")
    if inductor is not None and op in inductor.decompositions:
        del inductor.decompositions[op]
        inductor.fast_random_decomps().pop(op, None)


class Operator:
    """`torch.ops.deit_fast.<name>`; calling the instance is calling the operator, by the shortest way.

    Methods get an operator's arguments as a namedtuple with the names of `stock`'s parameters, here `a`.
    """

    name: str
    # The operator in stock PyTorch, differentiable: the CPU path. Its annotated types are the schema.
    stock: Callable[..., Any]
    # Of the kernels; the same arguments.
    launcher: Callable[..., Any]
    # The arguments that autocast casts, and to what if not its own dtype.
    casts: tuple[str, ...] = ()
    casts_to: torch.dtype | None = None
    # The arguments that backward reads (it has all numbers besides), and the outputs that it reads.
    saves: tuple[str, ...] = ()
    saves_outputs: tuple[int, ...] = ()
    # What is data, and has no gradient: arguments, and outputs.
    data: tuple[str, ...] = ()
    data_outputs: tuple[int, ...] = ()
    # Whether autograd, of `stock`, would not do as well: keep more, or find no gradient where it is 0.
    own_backward = False

    def check(self, a: Any) -> None:
        """Raises on arguments that do not fit together, before any work."""

    def unsupported(self, a: Any) -> str | None:
        """Why the kernels can't take these arguments, or None."""
        raise NotImplementedError

    def fake(self, a: Any) -> Any:
        """Empty outputs: their shapes, dtypes and strides."""
        raise NotImplementedError

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """A gradient or None for each of `needs`, which says what is asked for; autograd casts them.

        needs: a flag for each tensor that is no data, in the order of the arguments. a: the arguments that were saved,
        and the numbers. outputs: those that were saved. grads: of all outputs, and after them of what `branching`
        returned last.
        """
        raise NotImplementedError

    def flops(self, a: Any) -> int:
        """Two for each multiply-add of a matrix product, as torch counts; what drop path drops is not computed."""
        return 0

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        """Arguments at the sizes of a model; `new` makes their tensors."""
        raise NotImplementedError

    # What follows is made from the declaration.

    def __init__(self) -> None:
        if missing := [part for part in ("name", "stock", "launcher") if not hasattr(type(self), part)]:
            raise TypeError(f"{type(self).__name__} declares no {' and no '.join(missing)}")
        self.arguments = declared(self.name, type(self).stock)
        names = [argument.name for argument in self.arguments]
        if unknown := {*self.casts, *self.saves, *self.data}.difference(names):
            raise TypeError(f"deit_fast.{self.name} has no arguments {sorted(unknown)}, which its declaration names")
        self.Arguments = _arguments(f"{type(self).__name__}Arguments", names)
        self._casts = tuple(names.index(name) for name in self.casts)
        self._flattened = flattening(self.arguments)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._kept = names.index("kept") if "kept" in names else None
        self.replayed = Replayed(self.name, type(self).launcher)
        _LIBRARY.define(self.name + schema(type(self).stock))
        self.op = getattr(torch.ops.deit_fast, self.name).default
        self._implement()
        if type(self).flops is not Operator.flops:
            count = lambda *args, out_val=None: self.flops(self.Arguments(*args))  # noqa: E731
            register_flop_formula(getattr(torch.ops.deit_fast, self.name), get_raw=True)(count)
        OPERATORS[self.name] = self

    def _implement(self) -> None:
        # Of all backends at once: what has a kernel at a backend's own key is never decomposed.
        key = "CompositeExplicitAutograd"
        _LIBRARY.impl(self.name, lambda *args: route(self, *self.flatten(*args), dispatched=True), key)
        _LIBRARY.impl(self.name, lambda *args: self(*args, dispatched=True), "Autograd")
        torch.library.register_fake(f"deit_fast::{self.name}", self._checked_fake, lib=_LIBRARY)
        for device_type in _AUTOCAST_KEYS:
            _LIBRARY.impl(self.name, self._autocast(device_type), _AUTOCAST_KEYS[device_type].name)
        self.op.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(self._decomposed)
        self._apply, self._apply_branching = self._make_functions()

    def _make_functions(self) -> tuple[Callable, Any]:
        """What `__call__` and `branching` apply where a gradient is wanted."""
        return _functions(self)

    def __call__(self, *args: Any, dispatched: bool = False) -> Any:
        """The operator, with a node in the graph where a gradient is wanted.

        dispatched: whether the dispatcher has chosen this, at its Autograd key.
        """
        if not dispatched:
            # torch.func transforms do not see through Python-registered operators, nor do dual numbers.
            if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
                return self.stock(*args)
            if torch.compiler.is_compiling():
                if backend.exported_as_stock():
                    return self.stock(*args)
                if not self.transparent(args):
                    return self.op(*args)
            if torch._C._is_any_autocast_enabled():
                return self.op(*args)
        # Where the dispatcher would go next, without its way through Python.
        if self.transparent(args):
            self.check(self.Arguments(*args))
            return self.stock(*args)
        layout, flat = self.flatten(*args)
        if torch.is_grad_enabled():
            for argument in flat:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    return self._apply(layout, *flat)
        return route(self, layout, flat)

    def branching(self, *args: Any) -> tuple[Any, Tensor]:
        """For where a residual goes past the operator: what it returns, and its first argument.

        `backward` then gets that one's gradient after the others, to add it where it writes its own.
        """
        x = args[0]
        if (
            not torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or self.transparent(args)
        ):
            return self(*args), x
        if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(x.device.type):
            layout, flat = self.flatten(*args)
            *outputs, x = self._apply_branching(layout, *flat)
        else:
            with _autocast_off(x.device.type):
                layout, flat = self.flatten(*self.cast(args, torch.get_autocast_dtype(x.device.type)))
                *outputs, x = self._apply_branching(layout, *flat)
        return outputs, x

    def transparent(self, args: tuple) -> bool:
        """Whether this call is nothing but its stock form, for autograd, Dynamo and subclasses too."""
        if not backend.transparent(_first(args[0])) or (self.own_backward and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_dynamo_compiling():
            # How many samples are kept must not become a shape of the graph.
            return self._kept is None or args[self._kept] is None
        # A dispatch mode sees our operators on every device.
        return not torch._C._len_torch_dispatch_stack()

    def cast(self, args: tuple, dtype: torch.dtype) -> tuple:
        """The arguments as autocast to `dtype` wants them."""
        cast = list(args)
        for i in self._casts:
            cast[i] = cast_argument(cast[i], self.casts_to or dtype)
        return tuple(cast)

    def flatten(self, *args: Any) -> tuple[Layout, tuple]:
        """The arguments with the tensors of lists in their places, and how those lie (`flat`)."""
        lengths, flat = self._flattened(*args)
        return self._layouts.get(lengths) or self._laid_out(lengths), flat

    def _laid_out(self, lengths: tuple[int, ...]) -> Layout:
        # As `Arguments._make`, without the way through Python.
        make = partial(tuple.__new__, self.Arguments)
        found = self._layouts[lengths] = layout(self.arguments, lengths, self.saves, self.data, make)
        return found

    def save(self, ctx: Any, layout: Layout, flat: tuple, outputs: tuple) -> None:
        """What `gradients` reads."""
        if self.saves_outputs:
            ctx.save_for_backward(*layout.saved(*flat), *[outputs[i] for i in self.saves_outputs])
        else:
            ctx.save_for_backward(*layout.saved(*flat))
        if self.data_outputs:
            ctx.mark_non_differentiable(*[outputs[i] for i in self.data_outputs])
        ctx.layout, ctx.numbers = layout, layout.numbers(*flat)

    def gradients(self, ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """What autograd wants of `backward`: a gradient or None for each argument, the layout first."""
        # Each asked for once: the flags are found anew, and a checkpoint gives its tensors no second time.
        layout, kept, needed = ctx.layout, ctx.saved_tensors, ctx.needs_input_grad
        if grads[0] is None and not any(grad is not None for grad in grads):
            return (None,) * len(needed)
        count = layout.saved_count
        a = layout.restored(*kept[:count], *ctx.numbers)
        # Outputs not on ctx: each holds its node, and the two would wait for the garbage collector.
        found = self.backward(a, kept[count:], grads, layout.needs(*needed))
        if len(found) != layout.gradients_count:
            raise TypeError(
                f"deit_fast.{self.name}: backward gave {len(found)} gradients, not {layout.gradients_count}"
            )
        return layout.gradients(*found)

    def _checked_fake(self, *args: Any) -> Any:
        _keep_whole_in_inductor(self.op)
        a = self.Arguments(*args)
        self.check(a)
        return self.fake(a)

    def _decomposed(self, *args: Any) -> Any:
        """The stock form for `ExportedProgram.run_decompositions`, whose default table has it; else it stays whole."""
        # Nobody else puts anything at an autograd key of Python's dispatcher.
        decomposing = torch._C.DispatchKey.AutogradCPU in self.op.py_kernels
        return self.stock(*args) if decomposing else NotImplemented

    def _autocast(self, device_type: str) -> Callable:
        def at_the_autocast_key(*args: Any) -> Any:
            args = self.cast(args, torch.get_autocast_dtype(device_type))
            with _autocast_off(device_type):
                return self.op(*args)

        return at_the_autocast_key


class BackwardOperator(Operator):
    """Gradients as an operator. Their own derivatives are those of `differentiable`, computed only where they are used.

    Its last argument is `needs`, a flag for each gradient that it knows: it returns those asked for, in that order, so
    that a frozen weight costs nothing. Forward has checked its arguments and autocast has cast them.
    """

    def differentiable(self, *args: Any) -> list[Tensor]:
        """`stock` as a function of what forward was given: its outputs, if they are arguments, are computed again."""
        return self.stock(*args)

    def __call__(self, *args: Any, dispatched: bool = False) -> Any:
        if not dispatched:
            # Batched gradients: neither vmap sees through Python-registered operators.
            if torch._C._are_functorch_transforms_active() or batches_gradients():
                return self.differentiable(*args) if torch.is_grad_enabled() else self.stock(*args)
            # Inside an autocast block the CPU path's own products would be cast again.
            if torch.compiler.is_dynamo_compiling() or torch._C._is_any_autocast_enabled():
                return self.op(*args)
        layout, flat = self.flatten(*args)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in flat):
            return list(self._apply(layout, *flat))
        return route(self, layout, flat)

    def _make_functions(self) -> tuple[Callable, Any]:
        return _second_derivative(self), None


def _functions(operator: Operator) -> tuple[Callable, Callable]:
    """`apply` of the operator's autograd function, and of the one that returns the first argument as well."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layout: Layout, *flat: Any) -> Any:
            outputs = route(operator, layout, flat)
            ctx.set_materialize_grads(False)
            if isinstance(outputs, Tensor):
                operator.save(ctx, layout, flat, (outputs,))
                return outputs
            outputs = tuple(outputs)
            operator.save(ctx, layout, flat, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            return operator.gradients(ctx, grads)

    class Branching(Function):
        @staticmethod
        def forward(ctx: Any, layout: Layout, *flat: Any) -> Any:
            return *_as_tuple(Function.forward(ctx, layout, *flat)), flat[0]

    # Past what Function does for torch.func alone, whose transforms never come here.
    return super(torch.autograd.Function, Function).apply, super(torch.autograd.Function, Branching).apply


def _second_derivative(operator: BackwardOperator) -> Callable:
    """`apply` of the autograd function of gradients, where `create_graph=True` asks for a graph of them."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layout: Layout, *flat: Any) -> Any:
            ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in flat))
            ctx.layout, ctx.numbers = layout, [None if isinstance(each, Tensor) else each for each in flat]
            ctx.set_materialize_grads(False)
            return tuple(route(operator, layout, flat))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            flat = [t if t is not None else n for t, n in zip(ctx.saved_tensors, ctx.numbers, strict=True)]
            gather, needs = ctx.layout.gather, ctx.needs_input_grad[1:]
            return None, *derivatives(lambda *flat: operator.differentiable(*gather(*flat)), flat, needs, grads)

    return super(torch.autograd.Function, Function).apply


def derivatives(
    function: Callable[..., Sequence[Tensor]], flat: list, needs: Sequence[bool], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Those of `function(*flat)`, computed again, for each of `flat` that `needs` one.

    They are differentiable in grad mode, which `create_graph=True` leaves on.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(flat[0].device.type, enabled=False):
        for i, need in enumerate(needs):
            if need:
                # Of its own, so that no way from one argument to another is counted.
                flat[i] = flat[i].view_as(flat[i]) if again else flat[i].detach().requires_grad_()
        outputs = function(*flat)
        given = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [each for each, need in zip(flat, needs, strict=True) if need]
        if not given:
            return [None] * len(needs)
        ys, gs = zip(*given, strict=True)
        found = torch.autograd.grad(ys, wanted, gs, create_graph=again, allow_unused=True)
    return distribute(list(found), needs)


def _autocast_off(device_type: str) -> Any:
    """A context in which the dispatcher passes autocast's keys by."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEY_SETS[device_type])


def _as_tuple(outputs: Any) -> tuple:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def _first(argument: Tensor | list[Tensor]) -> Tensor:
    return argument[0] if isinstance(argument, list) else argument


def cast_argument(argument: Any, dtype: torch.dtype) -> Any:
    """What autocast does to an eligible argument: floating, and not float64."""
    if isinstance(argument, list):
        return [cast_argument(each, dtype) for each in argument]
    if argument is None or not argument.is_floating_point() or argument.dtype is torch.float64:
        return argument
    return argument.to(dtype)


def _arguments(name: str, fields: list[str]) -> Any:
    """A namedtuple's type: none that a type checker could know."""
    return namedtuple(name, fields)


def distribute(gradients: list[Tensor], needs: Sequence[bool]) -> list[Any]:
    """The gradients asked for, at their places among all; None at the others'."""
    if len(gradients) == len(needs):
        return gradients
    found = iter(gradients)
    return [next(found) if need else None for need in needs]


def empty_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """As backward operators return them: contiguous, of the inputs' shapes and dtypes."""
    return [
        torch.empty(each.shape, dtype=each.dtype, device=each.device)
        for each, need in zip(inputs, needs, strict=True)
        if need and each is not None
    ]
