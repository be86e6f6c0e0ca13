"""timm's and transformers' DeiT-S distilled on two real photographs, stock and swapped."""

import copy
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.check.operator_calls import operator_calls
from deit_fast.data.evaluation import image_processor
from deit_fast.swap import SwapReport

SEED = 0
TIMM_MODEL = "deit_small_distilled_patch16_224"
TRANSFORMERS_MODEL = "facebook/deit-small-distilled-patch16-224"
HUB_SECONDS = 3
DOWNLOAD_SECONDS = 45
ROUNDS = 5


class Answers(NamedTuple):
    """Logits, [B, classes], of one model before it was swapped, while it was and after it was restored."""

    stock: Tensor
    swapped: Tensor
    restored: Tensor
    report: SwapReport


class Costs(NamedTuple):
    """Of one model, stock and swapped: operator calls that reach the dispatcher, and median seconds."""

    calls: list[int]
    seconds: list[float]


def build_timm(pretrained: bool) -> nn.Module:
    """timm's DeiT-S distilled."""
    import timm

    torch.manual_seed(SEED)
    return timm.create_model(TIMM_MODEL, pretrained=pretrained)


def build_transformers(pretrained: bool) -> nn.Module:
    """transformers' DeiT-S distilled."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    if pretrained:
        return DeiTForImageClassificationWithTeacher.from_pretrained(TRANSFORMERS_MODEL)
    torch.manual_seed(SEED)
    options: dict[str, Any] = {"num_labels": 1000}  # which a base class takes, past the types
    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, **options)
    return DeiTForImageClassificationWithTeacher(config)


BUILDERS: dict[str, Callable[[bool], nn.Module]] = {"timm": build_timm, "transformers": build_transformers}


def weights_can_be_fetched() -> tuple[bool, str]:
    """Whether the hub hands out both models' weights in reasonable time, and why or why not."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False, "HF_HUB_OFFLINE is set"
    if not hub_answers():
        return False, f"no model hub answered within {HUB_SECONDS} s"
    # In a process of its own, which can be stopped: the hub's client retries for minutes.
    code = "from deit_fast.benchmark.photographs import BUILDERS\nfor build in BUILDERS.values(): build(True)"
    try:
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=DOWNLOAD_SECONDS)
    except subprocess.SubprocessError:
        return False, f"the model hub answered but the weights did not arrive within {DOWNLOAD_SECONDS} s"
    return True, "from the model hub"


def hub_answers() -> bool:
    """One request to the hub."""
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        with suppress(Exception):
            urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
            answered.set()

    # In a thread, since looking up the hub's name has no time limit.
    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(HUB_SECONDS)


def photographs() -> tuple[list[str], Tensor]:
    """scikit-learn's two photographs, by name and as [2, 3, 224, 224]."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    names = [os.path.basename(name) for name in samples.filenames]
    return names, image_processor(None, 224)(samples.images, return_tensors="pt").pixel_values


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """[B, classes], of either library's model."""
    output = model(images)
    return getattr(output, "logits", output)


@torch.inference_mode()
def answers(model: nn.Module, images: Tensor) -> Answers:
    """Of a model that is left as it was. images: [B, 3, H, W]."""
    stock = logits(model, images)
    report = deit_fast.swap(model)
    swapped = logits(model, images)
    deit_fast.restore(model)
    return Answers(stock, swapped, logits(model, images), report)


@torch.inference_mode()
def costs(model: nn.Module, images: Tensor) -> Costs:
    """Of a model in the dtype of images [B, 3, H, W], to which it is put."""
    stock = model.to(images.dtype)
    swapped = copy.deepcopy(stock)
    deit_fast.swap(swapped)
    runs: list[Callable[[], object]] = [partial(logits, model, images) for model in (stock, swapped)]
    return Costs([operator_calls(run) for run in runs], median_seconds(runs, ROUNDS))


def median_seconds(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Median time of each, taken in turn so that a slow spell of the machine meets them all."""
    seconds: list[list[float]] = [[] for _ in runs]
    for round_number in range(rounds + 1):
        for run, times in zip(runs, seconds, strict=True):
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            if round_number:  # the first one warms up
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
