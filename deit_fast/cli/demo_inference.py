"""First half of `deit-fast demo`: stock and swapped DeiT side by side on two real photographs."""

import json
import os
import subprocess
import sys
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deit_fast.benchmark.photographs import BUILDERS, SEED, answers, costs, photographs, weights_can_be_fetched
from deit_fast.cli.progress import bar, progress_bars
from deit_fast.data.labels import default_labels

if TYPE_CHECKING:
    from rich.console import Console

TOLERANCE = 1e-4
INTERPRETER_SECONDS = 600
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


def compare(
    console: "Console", library: str, model: nn.Module, names: list[str], images: Tensor, labels: list[str]
) -> bool:
    """Stock, swapped and restored answers of one model, which is left as it was. images: [B, 3, H, W]."""
    stock, swapped, restored, report = answers(model, images)
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
    """Both models' five likeliest classes of one photograph. stock, swapped: logits [C]."""
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
    result = interpret(console)
    if result is None:
        return False
    blocks, of_model = result["blocks"], result["blocks_of_model"]
    depth = f"all {blocks} blocks" if blocks == of_model else f"{blocks} of {of_model} blocks, to save time"
    console.print(
        f"{result['model']}, {depth}, one photograph, {result['seconds']:.0f} s: "
        f"{result['launches']} launches; largest logit {result['scale']:.3g}, largest difference to stock "
        f"[bold]{result['difference']:.2g}[/] (limit {TOLERANCE:g})."
    )
    return result["difference"] < TOLERANCE and result["launches"] > 0


def interpret(console: "Console") -> dict[str, Any] | None:
    """What `interpreter_check` finds, with a bar of its launches; None, said why, where it finds nothing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DEIT_FAST_BACKEND": "triton"}
    command = [sys.executable, "-m", "deit_fast.benchmark.interpreter_check"]
    lines: list[dict[str, Any]] = []
    talk: list[str] = []
    with (
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
        progress_bars(console) as progress,
    ):
        update = bar(progress, "launches")
        stop = threading.Timer(INTERPRETER_SECONDS, process.kill)
        stop.start()
        try:
            for line in process.stdout or ():
                if not line.startswith("{"):
                    talk.append(line)
                    continue
                lines.append(json.loads(line))
                if "launch" in lines[-1]:
                    update(lines[-1]["launch"], lines[-1]["of"])
            code, too_late = process.wait(), stop.finished.is_set()
        finally:
            stop.cancel()
    if too_late:
        console.print(f"[bold red]No result within {INTERPRETER_SECONDS} s.[/]")
    elif code:
        console.print("".join(talk), markup=False)
    return None if code else lines[-1]


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
    with console.status("counting and timing"):
        for library, model in models.items():
            found = costs(model, images)
            times = (f"{1000 * seconds:.1f}" for seconds in found.seconds)
            table.add_row(library, *map(str, found.calls), *times)
    console.rule("Operator calls and time")
    console.print(table)
    if not images.is_cuda:
        console.print("Times are of this CPU, where both run stock PyTorch code: they say nothing about a GPU.")
