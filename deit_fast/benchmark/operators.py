"""Times each operator of a model's step beside the stock one and what other libraries have in its place."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from deit_fast.benchmark.clock import Clock
from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.flops import flop_counter
from deit_fast.benchmark.measure import DeviceLostError, failures, whole_rounds
from deit_fast.benchmark.operator_cases import OperatorCase, operator_cases
from deit_fast.check.accuracy import refuse_wrong, relative_error
from deit_fast.kernels.attention import separate
from deit_fast.kernels.launching import tuned


@dataclass
class OperatorRow:
    """One contender for one operator of a step.

    times: how often the step calls it. flops: of its matrix products. moved: bytes of its distinct inputs and outputs.
    fallbacks: why the stock operator answered for deit_fast's.
    """

    case: ModelCase
    operator: str
    shape: str
    times: int
    contender: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    failure: str | None = None
    flops: int | None = None
    moved: int = 0
    fallbacks: list[str] = field(default_factory=list)


# A peer takes an operator's arguments and returns the call to time, or None where it has nothing in its place.
Peer = Callable[..., Callable[[], Tensor] | None]


def _liger_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Callable[[], Tensor] | None:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return None if weight is None or bias is None else lambda: LigerLayerNormFunction.apply(x, weight, bias, eps)


def _apex_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Callable[[], Tensor] | None:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return None if weight is None else lambda: fused_layer_norm_affine(x, weight, bias, weight.shape, eps)


def _flash_attention(qkv: list[Tensor], scale: float, kept: Tensor | None) -> Callable[[], Tensor] | None:
    from flash_attn import flash_attn_qkvpacked_func

    if kept is not None or len(qkv) > 1 or qkv[0].dtype is torch.float32:
        return None
    return lambda: flash_attn_qkvpacked_func(qkv[0], softmax_scale=scale).flatten(2)


def _xformers_attention(qkv: list[Tensor], scale: float, kept: Tensor | None) -> Callable[[], Tensor] | None:
    from xformers.ops import memory_efficient_attention

    if kept is not None:
        return None
    q, k, v = separate(qkv)
    return lambda: memory_efficient_attention(q, k, v, scale=scale).flatten(2)


# By operator: who, the package, the call.
PEERS: dict[str, tuple[tuple[str, str, Peer], ...]] = {
    "layer_norm": (("Liger", "liger_kernel", _liger_layer_norm), ("Apex", "apex", _apex_layer_norm)),
    "attention": (("flash-attn", "flash_attn", _flash_attention), ("xformers", "xformers", _xformers_attention)),
}


def measure_operators(
    case: ModelCase, device: torch.device, clock: Clock, rounds: int, say: Callable[[str], None]
) -> Iterator[OperatorRow]:
    """Rows of every operator of the step, checked against the stock operator in float64; drop path off.

    Of an operator that was interrupted, what is whole.
    """
    for each in operator_cases(replace(case, drop_path=0.0), device):
        say(each.title)
        rows: list[OperatorRow] = []
        try:
            with torch.no_grad():
                _measure(rows, case, each, device, clock, rounds)
        except (KeyboardInterrupt, DeviceLostError):
            yield from whole_rounds(rows)
            raise
        yield from rows


def _measure(
    rows: list[OperatorRow], case: ModelCase, each: OperatorCase, device: torch.device, clock: Clock, rounds: int
) -> None:
    def row(contender: str) -> OperatorRow:
        return OperatorRow(case, each.operator.name, each.shape, each.times, contender)

    reference = row("stock in float64")
    with failures(reference):
        expected = _tensors(each.operator.stock(*_double(each.arguments)))
        stock = _tensors(each.operator.stock(*each.arguments))
        flops = _flops(each)
    if reference.failure is not None:
        rows.append(reference)
        return
    moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*_tensors(each.arguments), *stock)}.values())
    calls = {}
    for name, call in _contenders(each, device):
        found = replace(row(name), flops=flops, moved=moved)
        rows.append(found)
        if isinstance(call, str):
            found.failure = call
            continue
        with failures(found):
            found.error = _check(_tensors(call()), stock, expected)
            calls[name] = (call, clock.calls(call))
    for _ in range(rounds):
        for found in rows:
            if found.contender in calls and found.failure is None:
                with failures(found):
                    found.seconds.append(clock.seconds(*calls[found.contender]))


def _contenders(each: OperatorCase, device: torch.device) -> Iterator[tuple[str, Callable[[], object] | str]]:
    """Names and calls; or why there is none."""

    def ours(heeding: bool) -> Callable[[], object]:
        def call() -> object:
            with tuned.enabled(heeding):
                return each.operator.op(*each.arguments)

        return call

    yield "stock", lambda: each.operator.stock(*each.arguments)
    yield "deit_fast", ours(False)
    if device.type == "cuda":
        yield "deit_fast, tuned", ours(True)
        for name, package, peer in PEERS.get(each.operator.name, ()):
            if find_spec(package) is None:
                yield name, f"{package} is not installed"
            elif (call := peer(*each.arguments)) is not None:
                yield name, call


def _check(found: list[Tensor], stock: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of a result. Peers return the first result alone.

    Raises:
        ArithmeticError: it is too much larger than the stock operator's (`refuse_wrong`).
    """
    largest = max(float(right.norm()) for right in expected)
    worst = 0.0
    for ours, theirs, right in zip(found, stock, expected, strict=False):
        # The gradient of a key's bias is nothing but rounding: it is held to the size of the others.
        error, allowed = (relative_error(t, right, least=largest / 100) for t in (ours, theirs))
        refuse_wrong(error, allowed, theirs.dtype, "operator")
        worst = max(worst, error)
    return worst


def _double(arguments: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, arguments)


def _tensors(result: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _flops(each: OperatorCase) -> int:
    with flop_counter() as counter:
        each.operator.op(*each.arguments)
    return counter.get_total_flops()
