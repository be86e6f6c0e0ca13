"""One operator, three ways: its Triton kernels in the interpreter, stock PyTorch, and `reference/` in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import reference
from deit_fast import ops
from deit_fast.ops import backend
from deit_fast.ops.operator import OPERATORS
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.guard import Guard

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Around the block sizes (16, 64, 128, 256), one token, and DeiT's own at 224 and 384 pixels.
TOKENS = (1, 2, 17, 64, 65, 196, 197, 198, 199, 256, 257, 577, 578)
# Every DeiT width, powers of two, and two that are no multiple of 16.
WIDTHS = (64, 128, 192, 256, 384, 768, 1024, 50, 200)
BATCHES = (0, 1, 3)


class Ways(NamedTuple):
    """What is no operator's name: functions of the same arguments."""

    name: str
    ours: Callable
    stock: Callable
    exact: Callable

    def __str__(self) -> str:
        return self.name


def _one_projection(function: Callable) -> Callable:
    """Of tensors, as the tests give them, what takes lists of projections."""

    def call(x, norm_weight, norm_bias, eps, weight, bias=None, activation="none"):
        return function(x, norm_weight, norm_bias, eps, [weight], [bias], None, None, activation)

    return call


def _three_projections(function: Callable) -> Callable:
    """Weight and bias of q, of k and of v follow each other."""

    def call(x, norm_weight, norm_bias, eps, *projections):
        return function(x, norm_weight, norm_bias, eps, list(projections[0:6:2]), list(projections[1:6:2]))

    return call


# By the test's name, the operator's, and how its function is called. Where q, k and v come apart is another way in.
_CALLED: dict[str, tuple[str, Callable]] = {
    "layer_norm_linear": ("layer_norm_linear", _one_projection),
    "layer_norm_qkv": ("layer_norm_linear", _three_projections),
    "attention": ("attention", lambda function: lambda qkv, *rest: function([qkv], *rest)),
    "attention_qkv": ("attention", lambda function: lambda q, k, v, *rest: function([q, k, v], *rest)),
}


def ways_of(name: str) -> Ways:
    op, called = _CALLED.get(name, (name, lambda function: function))
    return Ways(name, called(getattr(ops, op)), called(_stock(op)), getattr(reference, name))


def _stock(op: str) -> Callable:
    """The operator in stock PyTorch, whose gradients are PyTorch's own."""
    operator = OPERATORS[op]
    absent = ["none" if argument.name == "activation" else None for argument in operator.arguments]
    return lambda *given: operator.stock(*given, *absent[len(given) :])


def assert_op_is_right(op: str | Ways, *arguments) -> tuple[Tensor, ...]:
    """Runs `op` on `arguments` all three ways, the kernels in guard bands; returns the kernels' outputs."""
    ways = op if isinstance(op, Ways) else ways_of(op)
    # An operator's stock form is also what it is itself, forced to that.
    _, function, stock_function, reference = ways if isinstance(op, Ways) else ways._replace(stock=ways.ours)
    guard = Guard()
    banded = [guard(a, name=f"argument {i}") if isinstance(a, Tensor) else a for i, a in enumerate(arguments)]
    with backend.forced("triton"), guard.outputs():
        ours = _tuple(function(*banded))
    guard.assert_untouched()
    with backend.forced("torch"):
        stock = _tuple(stock_function(*arguments))
    exact = _tuple(reference(*(_double(a) for a in arguments)))
    for i, (mine, theirs, truth) in enumerate(zip(ours, stock, exact, strict=True)):
        assert_as_accurate_as_stock(mine, theirs, truth, theirs.dtype, name=f"{op} output {i}")
        assert not mine.numel() or guard.output_count, "no output lay in guard bands"
    return ours


def assert_gradients_are_right(
    op: str | Ways, *arguments, chosen: str = "triton", wrt: tuple[int, ...] | None = None
) -> list:
    """Every gradient of `op` (of the arguments at `wrt`: all floating tensors, unless given), all three ways.

    Also: the same bits a second time, and guard bands untouched.
    """
    _, function, stock_function, reference = op if isinstance(op, Ways) else ways_of(op)
    if wrt is None:
        wrt = tuple(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point())
    cotangents: list[Tensor] = []

    def gradients(call, convert) -> list[Tensor]:
        inputs = [convert(a) for a in arguments]
        for i in wrt:
            inputs[i].requires_grad_()
        outputs = [output for output in _tuple(call(*inputs)) if output.requires_grad]
        if not cotangents:
            cotangents.extend(torch.randn(output.shape).to(output.dtype) for output in outputs)
        weights = [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=False)]
        return list(torch.autograd.grad(outputs[: len(weights)], [inputs[i] for i in wrt], weights))

    guard = Guard()
    with backend.forced(chosen), guard.outputs():
        ours = gradients(function, lambda a: guard(a.detach()) if isinstance(a, Tensor) else a)
        guard.assert_untouched()
        # In guard bands too: with the same strides, the stock operators take the same path.
        again = gradients(function, lambda a: guard(a.detach()) if isinstance(a, Tensor) else a)
    stock = gradients(stock_function, lambda a: a.detach().clone() if isinstance(a, Tensor) else a)
    exact = gradients(reference, lambda a: _double(a.detach()) if isinstance(a, Tensor) else a)
    for i, mine, twice, theirs, truth in zip(wrt, ours, again, stock, exact, strict=True):
        assert_as_accurate_as_stock(mine, theirs, truth, arguments[i].dtype, name=f"{op}: gradient of argument {i}")
        assert torch.equal(mine.nan_to_num(), twice.nan_to_num()), f"{op}: gradient of argument {i} changes"
    return ours


def _tuple(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _double(argument):
    is_float = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def strided(x: Tensor) -> Tensor:
    """`x` with strides that no launcher may assume: every second row and element of a larger tensor."""
    larger = torch.zeros([2 * n for n in x.shape], dtype=x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view
