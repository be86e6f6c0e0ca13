"""Step 4: each operator of a block's step, and each launch of it, beside stock's and the vendor's for the same work."""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deit_fast.benchmark import clock
from deit_fast.benchmark.flops import flop_counter
from deit_fast.benchmark.gpu.blocks import Shape, steps
from deit_fast.benchmark.operator_cases import OperatorCase, calls_of
from deit_fast.kernels import launch, replay, tuned
from deit_fast.ops import backend


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
            seconds["deit_fast"] = clock.graph_seconds(lambda: case.operator.call(*case.arguments))
        launched = list(_launches(case))
        for name, call in (("stock", lambda: case.operator.stock(*case.arguments)), *_peers(case)):
            try:
                seconds[name] = clock.graph_seconds(call)
            except Exception as error:  # ours is timed all the same
                not_timed[name] = backend.in_a_line(error)
        with flop_counter() as counter:
            case.operator.call(*case.arguments)
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
        "fallbacks": list(fallbacks),
    }


def _launches(case: OperatorCase) -> Iterator[dict[str, object]]:
    with replay.enabled(False), launch.recorded() as launches:
        case.operator.call(*case.arguments)
    for compiled, programs, arguments, device in launches:
        if compiled is None:
            continue
        run = _runner(compiled, programs, arguments, device)
        function = compiled.src.fn
        described = {} if function.launch_metadata is None else function.launch_metadata(
            (programs, 1, 1), compiled.metadata, dict(zip(function.arg_names, arguments, strict=True))
        )  # fmt: skip
        yield {
            "kernel": function.__name__,
            "name": described.get("name", function.__name__),
            "seconds": clock.graph_seconds(run),
            "flops": sum(value for key, value in described.items() if key.startswith("flops")),
            "bytes": described.get("bytes", 0),
            "programs": programs,
            "registers": compiled.n_regs,
            "spills": compiled.n_spills,
            "shared": compiled.metadata.shared,
        }


def _runner(compiled: object, programs: int, arguments: tuple, device: int) -> Callable[[], None]:
    from triton.runtime import driver

    def run() -> None:
        stream = driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments
        )  # fmt: skip

    return run


def _peers(case: OperatorCase) -> Iterator[tuple[str, Callable[[], object]]]:
    """The vendor's bare product for each weight matrix, forward or backward; flash attention for attention."""
    named = dict(zip(case.operator.parameters, case.arguments, strict=True))
    backward = case.operator.name.endswith("_backward")
    if case.operator.name == "attention":
        q, k, v = (t.transpose(1, 2) for t in named["qkv"].unbind(2))

        def flash() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, scale=named["scale"])

        yield "flash SDPA", flash
        return
    weights = [
        w for n, a in named.items() if "weight" in n
        for w in (a if isinstance(a, list) else [a]) if isinstance(w, Tensor) and w.ndim == 2
    ]  # fmt: skip
    rows = next((a for a in _tensors(case.arguments) if a.ndim == 3), None)
    if not weights or rows is None:
        return
    count = rows.shape[0] * rows.shape[1]
    operands = [(torch.randn(count, w.shape[1]).to(w), torch.randn(count, w.shape[0]).to(w), w) for w in weights]

    def products() -> None:
        for x, grad, weight in operands:
            if backward:
                torch.mm(grad, weight)
                torch.mm(grad.T, x)
            else:
                torch.mm(x, weight.T)

    yield "vendor's GEMM alone", products


def _tensors(tree: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
