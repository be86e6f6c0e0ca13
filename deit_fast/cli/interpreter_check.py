"""DeiT-Ti on one photograph, its Triton kernels run by Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 DEIT_FAST_BACKEND=triton python -m deit_fast.cli.interpreter_check

`deit-fast demo` runs this in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
Prints a line of JSON. Where the first block shows that all twelve would take longer than `BUDGET_SECONDS`, a
model of fewer blocks is run.
"""

import json
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import timm
import torch
from triton.runtime.interpreter import GridExecutor

import deit_fast
from deit_fast.cli.demo_inference import SEED, logits, photographs

MODEL = "deit_tiny_patch16_224"
DEPTH = 12
BUDGET_SECONDS = 120


def main() -> None:
    """Check, and print the result."""
    # No operator may quietly answer with stock PyTorch code here.
    warnings.filterwarnings("error", message="deit_fast")
    first = check(depth=1)
    affordable = int(BUDGET_SECONDS / first["seconds"])  # too few rather than too many: that one pays for start-up too
    print(json.dumps(check(depth=min(DEPTH, max(1, affordable)))))


def check(depth: int) -> dict[str, str | float]:
    """A seeded model of `depth` blocks on one photograph, by the stock operators and by the kernels.

    launches: of kernels. seconds: that they took. scale: the largest absolute logit. difference: the largest
    absolute difference of the logits.
    """
    torch.manual_seed(SEED)
    model = timm.create_model(MODEL, depth=depth).eval()
    images = photographs()[1][:1]
    with torch.inference_mode():
        expected = logits(model, images)
        deit_fast.swap(model)
        start = time.perf_counter()
        with counted_launches() as launches:
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


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the kernels that the interpreter launches within the block."""
    names: list[str] = []
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    try:
        yield names
    finally:
        GridExecutor.__call__ = launch


if __name__ == "__main__":
    main()
