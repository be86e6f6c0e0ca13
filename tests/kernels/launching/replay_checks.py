"""Makes every operator's launches anew and again from their plan, on a GPU that only notes what it is given.

Prints what differed, as JSON for `test_replay`. A program of its own because the test process has TRITON_INTERPRET set.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import jit

from deit_fast import ops
from deit_fast.check.cases import INTERPRETER_SIZES, OPS, CheckCase, cases
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.launching import replay
from deit_fast.nn import Block
from deit_fast.ops import backend, half, operator

HALVES = ops.attention_half, ops.mlp_half
SCALED = {"init_values": 0.1, "drop_path": 0.5}


class Compiled:
    """What Triton would have compiled, for `seen` to note what it is run with."""

    function = packed_metadata = metadata = None

    def __init__(self, name: str, seen: list) -> None:
        self.name, self.seen = name, seen

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments) -> None:
        pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.seen.append((self.name, (x, y, z), pointers, [isinstance(a, Tensor) for a in arguments]))


class Holding(TorchDispatchMode):
    """Of operators between deit_fast's, such as autocast's casts."""

    def __init__(self, held: list) -> None:
        super().__init__()
        self.held = held

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.held.append(func(*args, **(kwargs or {})))
        return self.held[-1]


@contextmanager
def kept_alive(dispatched: bool = True) -> Iterator[None]:
    """Holds what is allocated, so that no address serves twice.

    dispatched: also what other operators allocate, with a mode under which no operators are chained.
    """
    held: list = []

    def holding(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def held_allocate(*args, **kwargs) -> Tensor:
            held.append(allocate(*args, **kwargs))
            return held[-1]

        return held_allocate

    with ExitStack() as stack:
        if dispatched:
            stack.enter_context(Holding(held))
        for name in ("empty", "empty_strided", "empty_like", "zeros"):
            stack.enter_context(mock.patch.object(torch, name, holding(getattr(torch, name))))
        # Drop path's draws, which live no longer than the node that reads them.
        stack.enter_context(mock.patch.object(Tensor, "new_empty", holding(Tensor.new_empty)))
        guards = torch._C._dynamo.guards
        stack.enter_context(mock.patch.object(guards, "_empty_strided_cpu", holding(guards._empty_strided_cpu)))
        for module in (half, operator):
            stack.enter_context(mock.patch.object(module, "cast_argument", holding(operator.cast_argument)))
        yield


class Gpu:
    """`launches` of one run after the other; addresses as the order in which a run first met them."""

    def __init__(self) -> None:
        self.seen: list = []
        self.anew = 0  # launches that went through Triton
        self.compiled: dict[tuple, Compiled] = {}

    def run_kernel(self, kernel, *args, grid, warmup, **options) -> Compiled:
        self.anew += 1
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        compiled = self.compiled.setdefault(kernel.__name__, Compiled(kernel.__name__, self.seen))
        compiled.run(*(*grid, 1, 1)[:3], 0, None, None, None, None, None, *(given[name] for name in kernel.arg_names))
        return compiled

    def launches(self, function: Callable[[], object], dispatched: bool = True) -> tuple[list, list, int]:
        """Launches, results, and how many launches went through Triton."""
        self.seen.clear()
        self.anew = 0
        with kept_alive(dispatched):
            results = [t for t in tree_leaves(function()) if isinstance(t, Tensor)]
            order: dict[int, int] = {}
            launches = []
            for name, grid, arguments, _ in self.seen:
                # Python integers this large are addresses.
                found = [order.setdefault(a, len(order)) if type(a) is int and a > 2**32 else str(a) for a in arguments]
                launches.append([name, grid, found])
            outputs = [
                [list(t.shape), t.stride(), str(t.dtype), order.get(t.data_ptr(), "not a kernel's")] for t in results
            ]
        return launches, outputs, self.anew


def differences(gpu: Gpu, title: str, function: Callable[[], object], dispatched: bool = True) -> dict:
    with replay.enabled(False):
        expected, outputs, _ = gpu.launches(function, dispatched)
    replay.forget()
    first = gpu.launches(function, dispatched)
    again = gpu.launches(function, dispatched)
    return {
        "chains": sum(
            plan is not None for each in HALVES for chain in each.all_chains for plan in chain.plans.values()
        ),
        "title": title,
        "launches": len(expected),
        "same": first[:2] == (expected, outputs) and again[:2] == (expected, outputs),
        "anew": again[2],
    }


def of_case(case: CheckCase) -> Callable[[], object]:
    wanted = [] if case.inference else case.differentiable

    def run() -> list:
        tensors = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in case.tensors.items()}
        with torch.set_grad_enabled(bool(wanted)):
            found = [t for t in tree_leaves(case.call(tensors)) if isinstance(t, Tensor)]
        if wanted:
            differentiable = [t for t in found if t.requires_grad]
            inputs = [tensors[name] for name in wanted]
            found += torch.autograd.grad(differentiable, inputs, [torch.ones_like(t) for t in differentiable])
        return found

    return run


def of_block(block: Block, x: Tensor, training: bool, autocast: bool) -> Callable[[], object]:
    def run() -> list:
        torch.manual_seed(0)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x)
        if not training:
            return [y]
        found = torch.autograd.grad(y, [x, *block.parameters()], torch.ones_like(y))
        # Autocast's own backward casts a weight's gradient, to an address that may have been freed before.
        return [y, *(gradient for gradient in found if not autocast or gradient.ndim != 2)]

    return run


def of_blocks(options: dict[str, dict]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Blocks of these options by what they are, in each precision, for inference and training."""
    for title, each in options.items():
        for dtype, autocast in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
            block = Block(64, 2, qkv_bias=True, **each).to(dtype)
            for training in (False, True):
                x = torch.zeros(4, 6, 64, dtype=dtype, requires_grad=training)
                what = f"{title} {dtype} {'autocast' if autocast else ''} {'training' if training else ''}"
                yield what, of_block(block.train(training), x, training, autocast)


def of_trained(block: Block, x: Tensor, *trained: str) -> Callable[[], object]:
    """Forward and backward with gradients of these parameters alone."""
    parameters = [parameter.requires_grad_(name in trained) for name, parameter in block.named_parameters()]

    def run() -> list:
        y = block(x)
        return [y, *torch.autograd.grad(y, [p for p in parameters if p.requires_grad], torch.ones_like(y))]

    return run


def of_separate_projections(block: Block) -> Callable[[], object]:
    """As transformers' layers have them."""
    attn = block.attn
    x = torch.zeros(4, 6, 64, dtype=torch.bfloat16, requires_grad=True)
    weights, biases = (list(t.detach().chunk(3)) for t in (attn.qkv.weight, attn.qkv.bias))
    trained = [t.clone().requires_grad_() for t in (*weights, *biases)]
    arguments = ops.AttentionHalf(
        block.norm1.weight, block.norm1.bias, 1e-6, 2, 0.125, attn.proj.weight, attn.proj.bias, None, None, None, None,
        0, trained[:3], trained[3:],
    )  # fmt: skip

    def run() -> list:
        y = ops.attention_half(x, arguments)
        return [y, *torch.autograd.grad(y, [x, *trained], torch.ones_like(y))]

    return run


def chained(gpu: Gpu) -> Iterator[dict]:
    """Whole blocks, of which nobody watches the operators."""
    for what, function in of_blocks({"block": {}, "block, LayerScale and drop path": SCALED}):
        yield differences(gpu, f"chained {what}", function, dispatched=False)
    block, x = Block(64, 2, qkv_bias=True).bfloat16(), torch.zeros(4, 6, 64, dtype=torch.bfloat16)
    yield differences(gpu, "chained, separate q, k, v", of_separate_projections(block), dispatched=False)
    for trained in (("mlp.fc2.bias",), ("norm2.weight", "mlp.fc1.weight"), ("attn.proj.weight",), ("norm1.bias",)):
        what = f"chained block, {', '.join(trained)} trained"
        yield differences(gpu, what, of_trained(block, x, *trained), dispatched=False)


def distinguished(gpu: Gpu) -> dict[str, bool]:
    """What must not be taken for the last call, though its shapes are the same."""
    x, weight = torch.zeros(4, 6, 64), torch.zeros(64, 64)
    unaligned = torch.zeros(4 * 6 * 64 + 1)[1:].view(4, 6, 64)
    residual, hidden = torch.zeros(4, 6, 64), torch.zeros(4, 6, 64)

    def anew(*arguments) -> bool:
        return gpu.launches(lambda: ops.fc2_residual(hidden, *arguments))[2] > 0

    with torch.no_grad():
        anew(x, weight, None, residual, None, None, "gelu")
        return {
            "the same": not anew(x, weight, None, residual, None, None, "gelu"),
            "other tensors": not anew(x + 1, weight + 1, None, residual + 1, None, None, "gelu"),
            "alignment": anew(unaligned, weight, None, residual, None, None, "gelu"),
            "a tensor given twice": anew(x, weight, None, x, None, None, "gelu"),
            "strides": anew(x, weight.T, None, residual, None, None, "gelu"),
            "a scalar": anew(x, weight, None, residual, None, None, "gelu_tanh"),
            "TF32": _with_tf32(lambda: anew(x, weight, None, residual, None, None, "gelu")),
            "a profiler": _with_hook(lambda: anew(x, weight, None, residual, None, None, "gelu")),
        }


def _with_tf32(function: Callable[[], bool]) -> bool:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return function()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def _with_hook(function: Callable[[], bool]) -> bool:
    from triton import knobs

    def hook(metadata) -> None: ...

    knobs.runtime.launch_enter_hook.add(hook)
    try:
        return function()
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)


def on_the_drivers_own_runner() -> bool:
    """Whether a compiled kernel's runner takes what a plan hands it: one operator, compiled, launched twice."""
    given: list[list] = []
    x, weight = torch.zeros(4, 16, 64, dtype=torch.bfloat16), torch.zeros(64, 64, dtype=torch.bfloat16)
    with recording(TARGETS["sm_90"]), replay.enabled(True), torch.no_grad():
        from triton.runtime import driver

        driver.active.launcher_cls = lambda source, metadata: lambda *arguments: given.append(list(arguments))
        for _ in range(2):
            ops.linear(x, weight, None)
    first, again = given
    shown = [[a.data_ptr() if isinstance(a, Tensor) else a for a in call] for call in given]
    kept = [i for i, argument in enumerate(first) if i not in (6, 7, 8)]  # metadata and hooks
    tensors = [i for i, argument in enumerate(first) if isinstance(argument, Tensor)]
    # The output's address is a new one.
    return len(first) == len(again) and all(shown[0][i] == shown[1][i] for i in kept if i != tensors[-1])


def linear_of(rows: int) -> Callable[[], Tensor]:
    x, weight = torch.zeros(rows, 64), torch.zeros(64, 64)
    return lambda: ops.linear(x, weight, None)


def with_a_runner_that_refuses_addresses(gpu: Gpu) -> dict:
    """How often, call by call, four shapes are run from a plan and launched through Triton; and what is said."""
    ran = []
    run = Compiled.run

    def refusing(self, *arguments) -> None:
        if not any(isinstance(argument, Tensor) for argument in arguments):
            ran.append(self.name)
            raise TypeError("an integer is no pointer")
        run(self, *arguments)

    seen = {"plans run": [], "anew": []}
    replay.forget()
    with torch.no_grad(), mock.patch.object(Compiled, "run", refusing), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for rows in (1, 2, 3, 4):
            calls = linear_of(rows)
            for _ in range(3):
                ran.clear()
                seen["anew"].append(gpu.launches(calls)[2])
                seen["plans run"].append(len(ran))
    replay.forget()
    return {**seen, "said": [str(each.message) for each in caught]}


def with_an_unknown_release(gpu: Gpu) -> dict:
    known = mock.patch.object(replay, "RUNNER_IS_KNOWN", False)
    with torch.no_grad(), known, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anew = [gpu.launches(linear_of(rows))[2] for rows in (5, 5, 6)]
    return {"anew": anew, "said": [str(each.message) for each in caught]}


def main() -> None:
    gpu = Gpu()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="deit_fast.*kernels failed")
        with recording(TARGETS["sm_90"]), replay.enabled(True), backend.forced("triton"):
            seen = []
            with mock.patch.object(jit.JITFunction, "run", lambda kernel, *a, **k: gpu.run_kernel(kernel, *a, **k)):
                for dtype in (torch.bfloat16, torch.float32):
                    for op in OPS:
                        for case in cases(op, INTERPRETER_SIZES[0], dtype, torch.device("cpu")):
                            seen.append(differences(gpu, f"{op} {case.title} {dtype}", of_case(case)))
                options = {"block": {}, "block, low": {"memory": "low"}, "block, LayerScale and drop path": SCALED}
                seen += [differences(gpu, what, function) for what, function in of_blocks(options)]
                seen += chained(gpu)
                apart = distinguished(gpu)
                refused = with_a_runner_that_refuses_addresses(gpu)
                unknown = with_an_unknown_release(gpu)
            with backend.forced("triton"):
                runs = on_the_drivers_own_runner()
                with mock.patch.object(torch._C._dynamo.guards, "_empty_strided_cpu", None):
                    without = on_the_drivers_own_runner()
    found = {"seen": seen, "apart": apart, "refused": refused, "unknown": unknown, "runs": runs, "without": without}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
