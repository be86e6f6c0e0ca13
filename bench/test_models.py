"""DeiT's inference and training step, stock and swapped: `pytest bench/ --benchmark-only`.

On a GPU where there is one. `deit-fast bench` is what to compare with: it gives each its turn in every round.
"""

import pytest
import torch

from deit_fast.benchmark.contenders import CONTENDERS, ModelCase
from deit_fast.benchmark.measure import TimedStep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH, DTYPE = (64, "bfloat16") if DEVICE.type == "cuda" else (2, "float32")


@pytest.mark.parametrize("contender", ["timm", "deit_fast"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_model(benchmark, size, training, contender):
    model = f"deit_{size}_distilled_patch16_224"
    case = ModelCase(model, BATCH, 224, DTYPE, training=training, drop_path=0.1 if training else 0.0)
    step = TimedStep(CONTENDERS[contender].prepare(case, DEVICE), case, DEVICE, BATCH)

    def run() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.title
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)
