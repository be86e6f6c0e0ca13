"""Second half of `deit-fast demo`: a distilled DeiT learns handwritten digits, stock and swapped from one seed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import deit_fast
from deit_fast.cli.saved_bytes import saved_bytes
from deit_fast.models import DeiTConfig
from deit_fast.models.description import to_metadata
from deit_fast.train import digits
from deit_fast.train.loop import train
from deit_fast.train.teacher import conv_net

if TYPE_CHECKING:
    from rich.console import Console

SEED = 0
CONFIG = DeiTConfig(
    embed_dim=96,
    depth=3,
    num_heads=3,
    img_size=digits.IMG_SIZE,
    patch_size=4,
    num_classes=digits.CLASSES,
    distilled=True,
)
BATCH_SIZE = 128
TEACHER_STEPS = 300
STUDENT_STEPS = 600
LEARNING_RATE = 3e-3
ALPHA = 0.5
SAVE_EVERY = 100

# Rounding differs between stock and swapped, and training lets it grow: only the first steps are held to a limit.
LOSS_STEPS = 60
LOSS_TOLERANCE = 1e-3
LEAST_ACCURACY = 0.97


class Result(NamedTuple):
    """Of one training: the loss of each step, accuracy on the test digits, and what it took."""

    losses: list[float]
    accuracy: float
    seconds: float
    saved_bytes: int


def run(console: "Console", device: torch.device, out: Path) -> bool:
    """Train the teacher and both students, and leave plot, checkpoints and a digit in `out`.

    False where a student learns too little, the losses part, or one is not finite.
    """
    console.rule("Training on handwritten digits")
    train_split, test_split = (split.to(device) for split in digits.load(SEED))
    console.print(
        f"{len(train_split.labels)} digits to learn from, {len(test_split.labels)} others to test with. DeiT of "
        f"{CONFIG.depth} blocks, width {CONFIG.embed_dim}, distilled (hard) from a convolutional network; AdamW, "
        f"float32, batches of {BATCH_SIZE}, {STUDENT_STEPS} steps."
    )
    try:
        with progress_bars(console) as progress:
            teacher = train_teacher(train_split, progress)
            results = {
                name: train_student(name, teacher, train_split, test_split, out, progress)
                for name in ("stock", "swapped")
            }
    except FloatingPointError as error:
        console.print(f"[bold red]{error}[/]")
        return False

    console.print(results_table(results))
    console.print(f"Teacher: {100 * accuracy(teacher, test_split):.1f} % of the test digits.")
    differences = loss_differences(results)
    first = max(differences[:LOSS_STEPS])
    console.print(
        f"Largest difference of the losses: [bold]{first:.2g}[/] in the first {LOSS_STEPS} steps "
        f"(limit {LOSS_TOLERANCE:g}), {max(differences):.2g} in all."
    )
    if device.type == "cpu":
        console.print("Seconds are of this CPU, where both run stock PyTorch code: they say nothing about a GPU.")
    draw(results, out / "training.png")
    digit = save_digit(test_split, out)
    console.print(f"Loss curves: {out / 'training.png'}. The swapped model answers:", soft_wrap=True)
    console.print(f"  deit-fast predict {digit} --checkpoint {checkpoint(out, 'swapped')}", soft_wrap=True)
    return first < LOSS_TOLERANCE and all(result.accuracy >= LEAST_ACCURACY for result in results.values())


# -- training


def build_student() -> nn.Module:
    """timm's distilled DeiT of `CONFIG`, which returns both heads' logits in training."""
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(SEED)
    model = VisionTransformerDistilled(
        img_size=CONFIG.img_size,
        patch_size=CONFIG.patch_size,
        num_classes=CONFIG.num_classes,
        embed_dim=CONFIG.embed_dim,
        depth=CONFIG.depth,
        num_heads=CONFIG.num_heads,
        weight_init="jax",  # unit gain at any width; timm's usual σ = 0.02 is small for one as narrow as this
    )
    model.set_distilled_training(True)
    return model


def train_teacher(split: digits.Split, progress: Any) -> nn.Module:
    """A convolutional network that has learnt the digits."""
    torch.manual_seed(SEED)
    teacher = conv_net(digits.CLASSES).to(split.images.device)
    train(
        teacher,
        lambda inputs, logits, labels: F.cross_entropy(logits, labels),
        digits.batches(split, BATCH_SIZE, SEED),
        steps=TEACHER_STEPS,
        lr=LEARNING_RATE,
        warmup_steps=TEACHER_STEPS // 10,
        on_step=bar(progress, "teacher", TEACHER_STEPS),
    )
    return teacher.eval()


def train_student(
    name: str, teacher: nn.Module, train_split: digits.Split, test_split: digits.Split, out: Path, progress: Any
) -> Result:
    """Train the stock or the swapped DeiT from the same weights on the same batches, and save it."""
    device = train_split.images.device
    model = build_student().to(device)
    if name == "swapped":
        deit_fast.swap(model)
    criterion = deit_fast.DistillationLoss(nn.CrossEntropyLoss(), teacher, "hard", alpha=ALPHA, tau=1.0)
    images = train_split.images[:BATCH_SIZE].clone()  # a view would count with all it is a view of
    kept = saved_bytes(model, lambda: model(images))
    start = time.perf_counter()
    losses = train(
        model,
        criterion,
        digits.batches(train_split, BATCH_SIZE, SEED),
        steps=STUDENT_STEPS,
        lr=LEARNING_RATE,
        warmup_steps=STUDENT_STEPS // 10,
        checkpoint=checkpoint(out, name),
        metadata=to_metadata(CONFIG, digits.image_processor().to_dict()),
        save_every=SAVE_EVERY,
        on_step=bar(progress, name, STUDENT_STEPS),
    )
    seconds = time.perf_counter() - start
    return Result(losses, accuracy(model, test_split), seconds, kept)


def checkpoint(out: Path, name: str) -> Path:
    """Where the stock or the swapped DeiT is saved."""
    return out / f"{name}.safetensors"


@torch.inference_mode()
def accuracy(model: nn.Module, split: digits.Split) -> float:
    """Share of the digits whose likeliest class is right; leaves the model in evaluation mode."""
    return (model.eval()(split.images).argmax(-1) == split.labels).double().mean().item()


def loss_differences(results: dict[str, Result]) -> list[float]:
    """Absolute, a step."""
    return [abs(a - b) for a, b in zip(results["stock"].losses, results["swapped"].losses, strict=True)]


# -- what is shown


def progress_bars(console: "Console") -> Any:
    """A line for each training: what is trained, steps, loss, time."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    loss = TextColumn("loss {task.fields[loss]}")
    name = TextColumn("{task.description}")
    return Progress(name, BarColumn(), MofNCompleteColumn(), loss, TimeElapsedColumn(), console=console)


def bar(progress: Any, name: str, steps: int) -> Callable[[int, float], None]:
    """A new progress bar, as `train` calls it."""
    task = progress.add_task(f"{name:>7}", total=steps, loss="")
    return lambda step, loss: progress.update(task, completed=step, loss=f"{loss:.3f}")


def results_table(results: dict[str, Result]) -> Any:
    """One row a student."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for heading in ("last loss", "test accuracy", "seconds", "saved for backward"):
        table.add_column(heading, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result.losses[-1]:.4f}",
            f"{100 * result.accuracy:.1f} %",
            f"{result.seconds:.1f}",
            f"{result.saved_bytes:,} bytes",
        )
    return table


def draw(results: dict[str, Result], path: Path) -> None:
    """Both loss curves, and how far apart they are, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    curves, gap = figure.subplots(1, 2)
    steps = range(1, len(results["stock"].losses) + 1)
    for (name, result), style in zip(results.items(), ("-", "--"), strict=True):
        label = f"{name}: {100 * result.accuracy:.1f} % of the test digits"
        curves.semilogy(steps, result.losses, style, label=label, linewidth=1)
    curves.set(title="DeiT on handwritten digits, distilled", xlabel="step", ylabel="loss")
    curves.legend()
    gap.semilogy(steps, loss_differences(results), color="black", linewidth=0.7)
    gap.plot((1, LOSS_STEPS), (LOSS_TOLERANCE,) * 2, color="red", label=f"limit for the first {LOSS_STEPS} steps")
    gap.set(title="stock and swapped from one seed", xlabel="step", ylabel="difference of the losses")
    gap.legend()
    figure.savefig(path, dpi=120)


def save_digit(split: digits.Split, out: Path) -> Path:
    """The first digit as the data set has it, 8 × 8 pixels, named by what it shows."""
    import PIL.Image

    path = out / f"digit-{split.labels[0].item()}.png"
    PIL.Image.fromarray(split.pixels[0]).save(path)
    return path
