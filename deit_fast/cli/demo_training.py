"""Second half of `deit-fast demo`: a distilled DeiT learns handwritten digits, stock and swapped from one seed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deit_fast.cli.progress import bar, progress_bars
from deit_fast.train import digits, students
from deit_fast.train.students import OnStep, Trained, loss_differences

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# Rounding differs between stock and swapped, and training lets it grow: only the first steps are held to a limit.
LOSS_STEPS = 60
LOSS_TOLERANCE = 1e-3
LEAST_ACCURACY = 0.97


def run(console: "Console", device: torch.device, out: Path) -> bool:
    """Train the teacher and both students, and leave plot, checkpoints and a digit in `out`.

    False where a student learns too little, the losses part, or one is not finite.
    """
    console.rule("Training on handwritten digits")
    train_split, test_split = digits.load()
    sizes = students.student_recipe().model_kwargs
    console.print(
        f"{len(train_split.labels)} digits to learn from, {len(test_split.labels)} others to test with. DeiT of "
        f"{sizes['depth']} blocks, width {sizes['embed_dim']}, distilled (hard) from a convolutional network; AdamW, "
        f"float32, batches of {students.BATCH_SIZE}, {students.STUDENT_EPOCHS} epochs."
    )
    images = out / "digits"
    digits.write_folder(images)
    cpu = device.type == "cpu"
    try:
        with progress_bars(console) as progress:
            taught = students.train_teacher(images, out / "teacher", step_bar(progress, "teacher"), cpu)
            results = {
                name: students.train_student(
                    images, out / name, out / "teacher", step_bar(progress, name), cpu, swapped=name == "swapped"
                )
                for name in ("stock", "swapped")
            }
    except (FloatingPointError, OSError) as error:
        console.print(f"[bold red]{error}[/]")
        return False

    console.print(results_table(results))
    console.print(f"Teacher: {100 * taught:.1f} % of the test digits.")
    differences = loss_differences(results)
    first = max(differences[:LOSS_STEPS])
    console.print(
        f"Largest difference of the losses: [bold]{first:.2g}[/] in the first {LOSS_STEPS} steps "
        f"(limit {LOSS_TOLERANCE:g}), {max(differences):.2g} in all."
    )
    if device.type == "cpu":
        console.print("Seconds are of this CPU, where both run stock PyTorch code: they say nothing about a GPU.")
    draw(results, out / "training.png")
    digit = next((images / "val").glob("*/0000.png"))
    console.print(f"Loss curves: {out / 'training.png'}. The swapped model answers:", soft_wrap=True)
    console.print(f"  deit-fast predict {digit} --checkpoint {out / 'swapped' / 'best'}", soft_wrap=True)
    return first < LOSS_TOLERANCE and all(result.accuracy >= LEAST_ACCURACY for result in results.values())


def step_bar(progress: "Progress", name: str) -> OnStep:
    """A new progress bar, as students call it."""
    update = bar(progress, f"{name:>7}")
    return lambda step, steps, loss: update(step, steps, f"loss {loss:.3f}")


def results_table(results: dict[str, Trained]) -> Any:
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


def draw(results: dict[str, Trained], path: Path) -> None:
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
