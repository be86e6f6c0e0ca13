"""DeiT-Ti on one photograph, its Triton kernels run by Triton's interpreter on the CPU.

    TRITON_INTERPRET=1 DEIT_FAST_BACKEND=triton python -m deit_fast.cli.interpreter_check

`deit-fast demo` runs this in a process of its own, since Triton reads TRITON_INTERPRET when it is imported.
Prints JSON: the number of blocks and of kernel launches, the seconds they took, the largest absolute logit of
the stock model and the largest absolute difference to it.
"""

import json
import time
import warnings

import timm
import torch
from triton.runtime.interpreter import GridExecutor

import deit_fast
from deit_fast.cli.demo import SEED, logits, photographs

MODEL = "deit_tiny_patch16_224"


def main() -> None:
    """Compare, and print the result as one line of JSON."""
    # No operator may quietly answer with stock PyTorch code here.
    warnings.filterwarnings("error", message="deit_fast")
    torch.manual_seed(SEED)
    model = timm.create_model(MODEL).eval()
    images = photographs()[1][:1]
    with torch.inference_mode():
        expected = logits(model, images)
        deit_fast.swap(model)
        launches = _count_launches()
        start = time.perf_counter()
        actual = logits(model, images)
        seconds = time.perf_counter() - start
    result = {
        "model": MODEL,
        "blocks": len(model.blocks),
        "launches": len(launches),
        "seconds": seconds,
        "scale": expected.abs().max().item(),
        "difference": (actual - expected).abs().max().item(),
    }
    print(json.dumps(result))


def _count_launches() -> list[str]:
    """From now on, the name of every kernel launched."""
    launches: list[str] = []
    launch = GridExecutor.__call__

    def counted(self, *args, **kwargs):
        launches.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    return launches


if __name__ == "__main__":
    main()
