"""What each way to ask a convolutional teacher takes: `python bench/teacher.py [--model regnety_002] [--compile]`.

Seconds for 1000 images, the least of rounds in which each has its turn. On a GPU where there is one, else of one core.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from deit_fast.train.folding import folded
from deit_fast.train.logits import Logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# A core's own time does not count what else runs on it.
clock = time.perf_counter if DEVICE.type == "cuda" else time.process_time


def ways(name: str, images: Tensor, compiled: bool) -> dict[str, Callable[[], object]]:
    """Each asks for the logits of `images`."""
    model = timm.create_model(name).eval().requires_grad_(False)
    models: dict[str, nn.Module] = {"as it is": model, "folded": folded(model, tuple(images.shape[1:]))}
    for before, after in (("as it is", "channels last"), ("folded", "folded, channels last")):
        models[after] = copy.deepcopy(models[before]).to(memory_format=torch.channels_last)
    if compiled:
        models["folded, channels last, compiled"] = copy.deepcopy(models["folded, channels last"])
        models["folded, channels last, compiled"].compile()
    images = images.to(DEVICE)
    made: dict[str, Callable[[], object]] = {how: partial(asked.to(DEVICE), images) for how, asked in models.items()}

    folder = Path(tempfile.mkdtemp())
    kept = Logits(folder, {}, classes=1000, hard=False)
    kept.get((0, 0, 0), DEVICE)
    kept.put((0, 0, 0), model(images))
    kept.flush()
    # The file is opened each time; in a run it is once an epoch.
    made["read from --teacher-logits"] = lambda: Logits(folder, {}, classes=1000, hard=False).get((0, 0, 0), DEVICE)
    return made


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    asked = ways(args.model, torch.randn(args.batch, 3, args.image_size, args.image_size), args.compile)
    seconds: dict[str, list[float]] = {how: [] for how in asked}
    for _ in range(args.rounds + 1):  # the first warms up
        for how, ask in asked.items():
            start = clock()
            ask()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds[how].append(clock() - start)
    for how, rounds in seconds.items():
        print(f"{how:34} {min(rounds[1:]) / args.batch * 1000:8.3f}")


if __name__ == "__main__":
    main()
