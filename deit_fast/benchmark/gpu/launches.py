"""Step 4: each operator of a block's step, and each launch of it, beside stock's and the vendor's for the same work."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit_fast.benchmark import clock
from deit_fast.benchmark.flops import flop_counter
from deit_fast.benchmark.gpu.blocks import Shape, steps
from deit_fast.benchmark.operator_cases import OperatorCase, calls_of
from deit_fast.kernels.attention import separate
from deit_fast.kernels.launching import replay, run, tuned
from deit_fast.kernels.linear import vendor_gemm
from deit_fast.ops import backend

# The vendor's whole attention, which computes what ours does.
FLASH = "flash SDPA"


@lru_cache(maxsize=1)
def operators(device: torch.device, shape: Shape) -> list[OperatorCase]:
    """Those that our block's step calls, with their arguments."""
    _, step = steps(shape, device)
    return calls_of(step)


def listed(device: torch.device, shape: Shape) -> list[str]:
    """Their names, in the order of their first calls."""
    return [f"{case.operator.name} {_of(case)}" for case in operators(device, shape)]


def _of(case: OperatorCase) -> str:
    """What tells an operator's calls of one step apart: its first weight, or its first argument."""
    parts = [part for part in case.shape.split(",") if "=" in part]
    return next((part for part in parts if "weight" in part), parts[0])


def operator_times(device: torch.device, shape: Shape, place: int) -> dict[str, object]:
    """Seconds of one operator, of the stock operators and the vendor's in its place, and of each launch it makes."""
    case = operators(device, shape)[place]
    seconds: dict[str, float] = {}
    not_timed: dict[str, str] = {}
    with torch.no_grad(), tuned.enabled(False):
        with backend.fallbacks() as fallbacks:
            seconds["deit_fast"] = clock.graph_seconds(lambda: case.operator.op(*case.arguments))
        vendor_gemm.used.clear()
        launched, failed = _launches(case)
        not_timed |= failed
        for name, call in (("stock", lambda: case.operator.stock(*case.arguments)), *_peers(case)):
            try:
                seconds[name] = clock.graph_seconds(call)
            except Exception as error:  # ours is timed all the same
                not_timed[name] = backend.in_a_line(error)
        with flop_counter() as counter:
            case.operator.op(*case.arguments)
        tensors = (*_tensors(case.arguments), *_tensors(case.operator.stock(*case.arguments)))
    return {
        "operator": case.operator.name,
        "shape": case.shape,
        "batch": case.batch,
        "times": case.times,
        "seconds": seconds,
        "not timed": not_timed,
        "flops": counter.get_total_flops(),
        "bytes": sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()),
        "launches": launched,
        "by the vendor": list(vendor_gemm.used),
        "fallbacks": list(fallbacks),
    }


def _launches(case: OperatorCase) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Each launch with its time and its work; those that can't be timed → why."""
    with replay.enabled(False), run.recorded() as launches:
        case.operator.op(*case.arguments)
    timed, failed = [], {}
    for compiled, programs, arguments, _ in launches:
        function = compiled.src.fn
        try:
            seconds = clock.graph_seconds(partial(compiled[(programs, 1, 1)], *arguments))
        except Exception as error:
            failed[function.__name__] = backend.in_a_line(error)
            continue
        named = dict(zip(function.arg_names, arguments, strict=True))
        described = function.launch_metadata((programs, 1, 1), compiled.metadata, named)
        timed.append(
            {
                "kernel": function.__name__,
                "name": described["name"],
                "symbol": described["symbol"],
                "seconds": seconds,
                "flops": sum(value for key, value in described.items() if key.startswith("flops")),
                "bytes": described["bytes"],
                "programs": programs,
                "registers": compiled.n_regs,
                "spills": compiled.n_spills,
                "shared": compiled.metadata.shared,
            }
        )
    return timed, failed


def _peers(case: OperatorCase) -> Iterator[tuple[str, Callable[[], object]]]:
    """The vendor's bare product for each weight matrix, forward or backward; flash attention for attention."""
    arguments: Any = case.operator.Arguments(*case.arguments)
    named = arguments._asdict()
    backward = case.operator.name.endswith("_backward")
    if case.operator.name == "attention":
        q, k, v = _by_head(named["qkv"])

        def flash() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, scale=named["scale"])

        yield FLASH, flash
        return
    if case.operator.name == "attention_backward":
        yield FLASH, _flash_backward(named)
        return
    weights = [
        w for n, a in named.items() if "weight" in n
        for w in (a if isinstance(a, list) else [a]) if isinstance(w, Tensor) and w.ndim == 2
    ]  # fmt: skip
    rows = next((a for a in _tensors(case.arguments) if a.ndim == 3), None)
    if not weights or rows is None:
        return
    count = rows.shape[0] * rows.shape[1]
    new = partial(torch.randn, device=rows.device, dtype=weights[0].dtype)
    operands = [(new(count, w.shape[1]), new(count, w.shape[0]), w) for w in weights]

    def products() -> None:
        for x, grad, weight in operands:
            if backward:
                torch.mm(grad, weight)
                torch.mm(grad.T, x)
            else:
                torch.mm(x, weight.T)

    yield "vendor's GEMM alone", products


def _by_head(qkv: list[Tensor]) -> list[Tensor]:
    """q, k and v as PyTorch's attention takes them, from one packed tensor or three."""
    return [t.transpose(1, 2) for t in separate(qkv)]


def _flash_backward(named: dict[str, Any]) -> Callable[[], object]:
    q, k, v = _by_head(named["qkv"])
    grad = named["grad"].unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    kept: list = []

    def backward() -> object:
        if not kept:
            kept.extend(torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=named["scale"]))
        out, log_sum_exp, *sizes, seed, offset, _ = kept
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, log_sum_exp, *sizes, 0.0, False, seed, offset, scale=named["scale"]
        )

    return backward


def _tensors(tree: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
