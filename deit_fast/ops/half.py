"""Half of a transformer block as one call for the host, and one node of autograd's graph.

Its operators always follow one another, so they are a chain (`ops/chain.py`). Where it can't be used the operators are
called one by one. Either way they are the same operators, and so are the numbers.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from deit_fast.ops import backend
from deit_fast.ops.chain import Chain
from deit_fast.ops.operator import batches_gradients, cast_argument, derivatives
from deit_fast.ops.product_dtype import as_dtype


class Half:
    """x [B, N, D] and its arguments, a NamedTuple `a` → x with a branch added.

    The methods are of one half. Those that get `kept` and `needs` get what `forward` returned after the result, and a
    flag for each of what `flat` gives.
    """

    name: str
    # Fields of `a`: the matrices, which autocast casts, and what the first operator takes.
    matrices: tuple[str, ...]
    first: tuple[str, ...]

    def one_by_one(self, x: Tensor, a: Any) -> Tensor:
        """By operators with nodes of their own, which refuse what stock refuses."""
        raise NotImplementedError

    def forward(self, x: Tensor, a: Any) -> tuple[Tensor, ...]:
        """The result, and what `backward` reads."""
        raise NotImplementedError

    def backward(self, grad: Tensor, x: Tensor, a: Any, kept: Sequence[Tensor], needs: Sequence[bool]) -> tuple:
        """A gradient or None for each of what `flat` gives."""
        raise NotImplementedError

    def flat(self, x: Tensor | None, a: Any) -> tuple:
        return (x, *a)

    def gathered(self, flat: Sequence[Any]) -> tuple[Any, Any]:
        """x and `a` of what `flat` has laid out, or of as many of anything else."""
        raise NotImplementedError

    def chains(self, a: Any) -> bool:
        """Whether this half is a chain, with gradients or without."""
        raise NotImplementedError

    def has_one_dtype(self, x: Tensor, a: Any) -> bool:
        """Whether x and the matrices have one."""
        raise NotImplementedError

    # What follows is made of these.

    def __init__(self) -> None:
        self._inference = Chain(self.name, lambda *flat: self.one_by_one(*self.gathered(flat)))
        self._training = Chain(f"{self.name}_training", lambda *flat: self.forward(*self.gathered(flat)))
        self._gradients = Chain(f"{self.name}_backward", self._found)
        self.all_chains = self._inference, self._training, self._gradients
        self._apply = _node(self)

    def __call__(self, x: Tensor, a: Any) -> Tensor:
        # Dynamo asks nothing else: it traces the operators.
        if torch.compiler.is_compiling() or not self._is_chain(x, a):
            return self.one_by_one(x, a)
        if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
            # All that the operators would cast: what they hand on has this dtype then.
            dtype = torch.get_autocast_dtype(x.device.type)
            a = a._replace(**{name: cast_argument(getattr(a, name), dtype) for name in self.matrices})
        flat = self.flat(x, a)
        if not torch.is_grad_enabled():
            return self._inference.run(flat)
        if x.requires_grad or _any_requires_grad([getattr(a, name) for name in self.first]):
            return self._apply(*flat)
        if _any_requires_grad(flat):
            # A node would save what only the first operator's gradients read.
            return self.one_by_one(x, a)
        with torch.no_grad():
            return self._inference.run(flat)

    def _is_chain(self, x: Tensor, a: Any) -> bool:
        """Whether the kernels compute it, and nobody differentiates through it by other means than a node."""
        if not backend.use_triton(x) or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return False
        # Room for fewer samples than there are is another shape at every step.
        if (a.kept is not None and a.capacity != x.shape[0]) or not self.chains(a):
            return False
        # The operators refuse any mixture that stock does.
        return self.has_one_dtype(x, a) or torch.is_autocast_enabled(x.device.type)

    def gradients(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Of each of `flat`.

        arguments: the result's gradient, what `flat` gives, what `forward` kept, a flag for each of `flat`.
        """
        if torch.compiler.is_compiling() or batches_gradients() or not backend.use_triton(arguments[0]):
            return self._found(*arguments)
        return self._gradients.run(arguments)

    def _found(self, *arguments: Any) -> tuple[Tensor | None, ...]:
        grad, *rest, needs = arguments
        count = len(needs)
        return self.backward(grad, *self.gathered(rest[:count]), rest[count:], needs)

    def _again(self, autocast: torch.dtype | None, flat: Sequence[Any]) -> Tensor:
        """The result, differentiable. autocast: what the matrices were cast to, whatever x is; or None."""
        x, a = self.gathered(flat)
        with torch.autocast(x.device.type, autocast, enabled=autocast is not None, cache_enabled=False):
            return self.one_by_one(x, a)


def _any_requires_grad(arguments: Sequence[Any]) -> bool:
    for argument in arguments:
        if isinstance(argument, Tensor):
            if argument.requires_grad:
                return True
        elif isinstance(argument, list) and _any_requires_grad(argument):
            return True
    return False


def gradients_of(a: Any, **found: Any) -> Any:
    """Of the fields of `a`: those found, None of the others."""
    return type(a)(**{**dict.fromkeys(a._fields), **found})


def like(residual: Tensor, grad: Tensor | None) -> Tensor | None:
    """As autograd hands a gradient on: where LayerScale widens the residual stream, it has another dtype."""
    return None if grad is None else as_dtype(grad, residual.dtype)


def _node(half: Half) -> Any:
    """`apply` of the half as one node of autograd's graph."""

    class HalfBlock(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Tensor:
            y, *kept = half._training.run(flat)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*_tensors(flat), *kept)
            device = y.device.type
            ctx.numbers = _numbers(flat)
            ctx.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
            # Each asked for once: a checkpoint gives its tensors no second time.
            numbers, saved, needs = ctx.numbers, ctx.saved_tensors, ctx.needs_input_grad
            if grad is None:
                return (None,) * len(numbers)
            flat, kept = _merged(saved, numbers), saved[len(numbers) :]
            if torch.is_grad_enabled():
                if batches_gradients():
                    # Its vmap sees through no node made here.
                    return tuple(derivatives(lambda *flat: [half._again(ctx.autocast, flat)], flat, needs, [grad]))
                return gradients(ctx.autocast, kept, needs, grad, *flat)
            return half.gradients(grad, *flat, *kept, needs)

    class HalfBlockGradients(torch.autograd.Function):
        """Where `create_graph=True` asks for a graph of them: what it takes is computed where that is used."""

        @staticmethod
        def forward(
            ctx: Any,
            autocast: torch.dtype | None,
            kept: Sequence[Tensor],
            needs: Sequence[bool],
            grad: Tensor,
            *flat: Any,
        ) -> tuple[Tensor | None, ...]:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(grad, *_tensors(flat))
            ctx.numbers, ctx.autocast, ctx.needs = _numbers(flat), autocast, needs
            return half.gradients(grad, *flat, *kept, needs)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            def differentiable(grad: Tensor, *flat: Any) -> list[Any]:
                wanted = [each for each, need in zip(flat, ctx.needs, strict=True) if need]
                y = half._again(ctx.autocast, flat)
                found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
                return [next(found) if need else None for need in ctx.needs]

            arguments = _merged(ctx.saved_tensors, [None, *ctx.numbers])
            found = derivatives(differentiable, arguments, ctx.needs_input_grad[3:], grads)
            return None, None, None, *found

    # Past what Function does for torch.func alone, whose transforms never come here.
    gradients: Any = super(torch.autograd.Function, HalfBlockGradients).apply
    return super(torch.autograd.Function, HalfBlock).apply


def _tensors(flat: Sequence[Any]) -> list[Tensor | None]:
    return [each if isinstance(each, Tensor) else None for each in flat]


def _numbers(flat: Sequence[Any]) -> list[Any]:
    return [None if isinstance(each, Tensor) else each for each in flat]


def _merged(tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> list[Any]:
    """What `_tensors` and `_numbers` have taken apart; more tensors may follow."""
    return [t if t is not None else n for t, n in zip(tensors, numbers, strict=False)]
