"""First half of `deit-fast demo`: stock and swapped DeiT side by side on two real photographs."""

import copy
import json
import os
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import deit_fast
from deit_fast.cli.operator_calls import operator_calls
from deit_fast.cli.predict import default_labels, image_processor

if TYPE_CHECKING:
    from rich.console import Console

TOLERANCE = 1e-4
SEED = 0
TIMM_MODEL = "deit_small_distilled_patch16_224"
TRANSFORMERS_MODEL = "facebook/deit-small-distilled-patch16-224"
HUB_SECONDS = 3
DOWNLOAD_SECONDS = 45
INTERPRETER_SECONDS = 180
ROUNDS = 5
GPU_BATCH = 64


def run(console: "Console", device: torch.device) -> bool:
    """Run every part; False where an answer of the swapped model is not the stock model's."""
    with console.status("building timm's and transformers' DeiT-S"):
        pretrained, reason = weights_can_be_fetched()
        models = {name: build(pretrained).to(device).eval() for name, build in BUILDERS.items()}
        names, images = photographs()
    console.print(f"Weights: {'pretrained on ImageNet' if pretrained else f'random, seed {SEED}'} ({reason}).")
    if device.type == "cpu":
        console.print("On a CPU the fused operators run stock PyTorch code; the Triton kernels come further down.")

    labels = default_labels(1000, trained=pretrained)
    passed = [compare(console, library, model, names, images.to(device), labels) for library, model in models.items()]
    if device.type == "cpu":
        passed.append(check_kernels(console))
    measure(console, models, images.to(device))
    return all(passed)


# -- the models and the photographs


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
    config = DeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    return DeiTForImageClassificationWithTeacher(config)


BUILDERS: dict[str, Callable[[bool], nn.Module]] = {"timm": build_timm, "transformers": build_transformers}


def weights_can_be_fetched() -> tuple[bool, str]:
    """Whether the hub hands out both models' weights in reasonable time, and why or why not."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False, "HF_HUB_OFFLINE is set"
    if not hub_answers():
        return False, f"no model hub answered within {HUB_SECONDS} s"
    # In a process of its own, which can be stopped: the hub's client retries for minutes.
    code = "from deit_fast.cli.demo_inference import BUILDERS\nfor build in BUILDERS.values(): build(True)"
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


# -- the parts


def compare(
    console: "Console", library: str, model: nn.Module, names: list[str], images: Tensor, labels: list[str]
) -> bool:
    """Stock, swapped and restored answers of one model, which is left as it was."""
    with torch.inference_mode():
        stock = logits(model, images)
        report = deit_fast.swap(model)
        swapped = logits(model, images)
        deit_fast.restore(model)
        restored = logits(model, images)

    console.rule(f"{library}: deit_fast.swap(model)")
    console.print(str(report), markup=False, soft_wrap=True)
    for name, before, after in zip(names, stock, swapped, strict=True):
        console.print(top5_table(name, before, after, labels))
    difference = (swapped - stock).abs().max().item()
    same_top5 = torch.equal(stock.topk(5).indices, swapped.topk(5).indices)
    passed = difference < TOLERANCE and same_top5 and torch.equal(stock, restored)
    console.print(
        f"Largest logit {stock.abs().max():.3g}, largest difference [bold]{difference:.2g}[/] "
        f"(limit {TOLERANCE:g}); top 5 {'agree' if same_top5 else 'DIFFER'}; "
        f"restored: {'bitwise the stock answer' if torch.equal(stock, restored) else 'NOT the stock answer'}."
    )
    return passed


def top5_table(title: str, stock: Tensor, swapped: Tensor, labels: list[str]) -> Any:
    """Both models' five likeliest classes of one photograph."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for heading in ("stock", "swapped"):
        table.add_column(f"{heading}: class", no_wrap=True, min_width=15, max_width=24)
        table.add_column("", justify="right")
    columns = []
    for values in (stock, swapped):
        top = values.float().softmax(-1).topk(5)
        columns.append([labels[index] for index in top.indices.tolist()])
        columns.append([f"{100 * probability:.3f} %" for probability in top.values.tolist()])
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def check_kernels(console: "Console") -> bool:
    """The Triton kernels themselves, interpreted: see `interpreter_check`."""
    console.rule("The Triton kernels in Triton's interpreter")
    if find_spec("triton") is None:
        console.print("Left out: Triton is not installed.")
        return True
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DEIT_FAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "deit_fast.cli.interpreter_check"]
    try:
        with console.status("interpreting DeiT-Ti's kernels on one photograph"):
            process = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=INTERPRETER_SECONDS
            )
    except subprocess.TimeoutExpired:
        console.print(f"[bold red]No result within {INTERPRETER_SECONDS} s.[/]")
        return False
    if process.returncode:
        console.print(process.stderr, markup=False)
        return False
    result = json.loads(process.stdout.splitlines()[-1])
    blocks, of_model = result["blocks"], result["blocks_of_model"]
    depth = f"all {blocks} blocks" if blocks == of_model else f"{blocks} of {of_model} blocks, for lack of time"
    console.print(
        f"{result['model']}, {depth}, one photograph, {result['seconds']:.0f} s: "
        f"{result['launches']} launches; largest logit {result['scale']:.3g}, largest difference to stock "
        f"[bold]{result['difference']:.2g}[/] (limit {TOLERANCE:g})."
    )
    return result["difference"] < TOLERANCE and result["launches"] > 0


def measure(console: "Console", models: dict[str, nn.Module], images: Tensor) -> None:
    """Operator calls that reach the dispatcher and median time of each model, stock and swapped."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if images.is_cuda:
        images = images.repeat(GPU_BATCH // len(images), 1, 1, 1).bfloat16()
    title = f"inference of {len(images)} images in {str(images.dtype).removeprefix('torch.')}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for heading in ("calls, stock", "swapped", "ms, stock", "swapped"):
        table.add_column(heading, justify="right")
    with console.status("counting and timing"), torch.inference_mode():
        for library, model in models.items():
            stock = model.to(images.dtype)
            swapped = copy.deepcopy(stock)
            deit_fast.swap(swapped)
            runs = [lambda model=model: logits(model, images) for model in (stock, swapped)]
            calls = [operator_calls(run) for run in runs]
            times = [1000 * seconds for seconds in median_seconds(runs)]
            table.add_row(library, *(str(count) for count in calls), *(f"{time:.1f}" for time in times))
    console.rule("Operator calls and time")
    console.print(table)
    if not images.is_cuda:
        console.print("Times are of this CPU, where both run stock PyTorch code: they say nothing about a GPU.")


def median_seconds(runs: list[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
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
