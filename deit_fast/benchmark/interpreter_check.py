"""DeiT-Ti on one photograph, its Triton kernels run by Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 DEIT_FAST_BACKEND=triton python -m deit_fast.benchmark.interpreter_check

`deit-fast demo` runs this in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
Prints a line of JSON after each launch and one with the result. The time of one block says how many fit into
`BUDGET_SECONDS`; the model has that many.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from triton.runtime.interpreter import GridExecutor

import deit_fast
from deit_fast.benchmark.photographs import SEED, logits, photographs

MODEL = "deit_tiny_patch16_224"
DEPTH = 12
BUDGET_SECONDS = 45
# A block that computes every token, and the last one, which computes only the rows that are read.
LEAST_DEPTH = 2


def main() -> None:
    """Check, and print progress and the result."""
    # No operator may quietly answer with stock PyTorch code here.
    warnings.filterwarnings("error", message="deit_fast")
    affordable = int(BUDGET_SECONDS / block_seconds())
    print(json.dumps(check(depth=min(DEPTH, max(LEAST_DEPTH, affordable)), on_launch=print_progress)))


def block_seconds() -> float:
    """The time of one block in the interpreter."""
    model = build(depth=LEAST_DEPTH)
    deit_fast.swap(model)
    tokens = torch.randn(1, model.pos_embed.shape[1], model.embed_dim)
    with torch.inference_mode():
        start = time.perf_counter()
        model.blocks[0](tokens)
        return time.perf_counter() - start


def print_progress(launch: int, launches: int) -> None:
    """The line that the demo reads after each launch."""
    print(json.dumps({"launch": launch, "of": launches}), flush=True)


def check(depth: int, on_launch: Callable[[int, int], None] = lambda launch, launches: None) -> dict[str, str | float]:
    """A seeded model of `depth` blocks on one photograph, by the stock operators and by the kernels.

    on_launch: called after each launch of a kernel with its number, from 1, and how many there will be.

    launches: of kernels. seconds: that they took. scale: the largest absolute logit. difference: the largest
    absolute difference of the logits.
    """
    model = build(depth)
    images = photographs()[1][:1]
    with torch.inference_mode():
        expected = logits(model, images)
        deit_fast.swap(model)
        with counted_launches(execute=False) as planned:
            logits(model, images)
        start = time.perf_counter()
        with counted_launches(lambda launch: on_launch(launch, len(planned))) as launches:
            actual = logits(model, images)
        seconds = time.perf_counter() - start
    return {
        "model": MODEL,
        "blocks": depth,
        "blocks_of_model": DEPTH,
        "launches": len(launches),
        "seconds": seconds,
        "scale": expected.abs().max().item(),
        "difference": (actual - expected).abs().max().item(),
    }


def build(depth: int) -> Any:
    """The seeded model, stock."""
    torch.manual_seed(SEED)
    return timm.create_model(MODEL, depth=depth).eval()


@contextmanager
def counted_launches(
    on_launch: Callable[[int], None] = lambda launch: None, execute: bool = True
) -> Iterator[list[str]]:
    """The names of the kernels that are launched within the block, by the interpreter unless `execute` is False."""
    names: list[str] = []
    launch = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        if execute:
            launch(self, *args, **kwargs)
        names.append(self.fn.__name__)
        on_launch(len(names))

    GridExecutor.__call__ = counted
    try:
        yield names
    finally:
        GridExecutor.__call__ = launch


if __name__ == "__main__":
    main()
