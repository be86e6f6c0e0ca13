"""A distilled DeiT that learns handwritten digits, stock or swapped, from one seed."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.train import recipe
from deit_fast.train.recipe import Recipe
from deit_fast.train.run import Job, Run

BATCH_SIZE = 64
IMG_SIZE = 16
TEACHER_EPOCHS = 8
STUDENT_EPOCHS = 15
# timm's 0.02 is small beside patches of unit scale: the model would look past their positions for hundreds of steps.
POSITIONS_STD = 0.5

# Gets the number of a step, the number of steps, and the step's loss.
OnStep = Callable[[int, int, float], None]


class Trained(NamedTuple):
    """Of one training: the loss of each step, accuracy on the test digits, and what it took."""

    losses: list[float]
    accuracy: float
    seconds: float
    saved_bytes: int


def teacher_recipe() -> Recipe:
    """A small convolutional network."""
    return _recipe(model="test_resnet", epochs=TEACHER_EPOCHS, lr=3e-3)


def student_recipe() -> Recipe:
    """DeiT, distilled (hard)."""
    return _recipe(
        model="deit_tiny_distilled_patch16_224",
        model_kwargs={
            "patch_size": 4,
            "embed_dim": 96,
            "depth": 3,
            "num_heads": 3,
            # Unit gain at any width; timm's usual σ = 0.02 is small for one as narrow as this.
            "weight_init": "jax",
        },
        epochs=STUDENT_EPOCHS,
        lr=2e-3,
        smoothing=0.0,
        distillation_type="hard",
    )


def _recipe(**given: Any) -> Recipe:
    """Of DeiT's what suits digits: they are neither mirrored nor mixed, and moved and stretched a little."""
    return recipe.load(
        input_size=IMG_SIZE,
        batch_size=BATCH_SIZE,
        unscale_lr=True,
        warmup_epochs=1,
        drop_path=0.0,
        repeated_aug=False,
        scale=(0.8, 1.0),
        train_interpolation="bilinear",
        eval_crop_ratio=1.0,
        hflip=0.0,
        aa=None,
        color_jitter=None,
        reprob=0.0,
        mixup=0.0,
        cutmix=0.0,
        **given,
    )


def train_teacher(digits: Path, out: Path, on_step: OnStep, cpu: bool) -> float:
    """A teacher as `out`/best, and its accuracy. digits: as `deit_fast.train.digits.write_folder` writes them."""
    run = Run(teacher_recipe(), _job(digits, out, cpu))
    return _train(run, on_step).accuracy


def train_student(digits: Path, out: Path, teacher: Path, on_step: OnStep, cpu: bool, swapped: bool) -> Trained:
    """Train the stock or the swapped DeiT from the same weights on the same batches; the best one is `out`/best."""
    run = Run(student_recipe(), _job(digits, out, cpu, teacher=str(teacher / "best"), swap=swapped))
    nn.init.normal_(run.model.pos_embed, std=POSITIONS_STD)
    return _train(run, on_step)


def _job(digits: Path, out: Path, cpu: bool, **given: Any) -> Job:
    if (out / "log.jsonl").exists():  # of an earlier demo
        shutil.rmtree(out)
    # Images this small are read faster than workers start.
    return Job(str(digits), str(out), num_workers=0, cpu=cpu, keep=1, log_every=1, **given)


def _train(run: Run, on_step: OnStep) -> Trained:
    records: list[dict[str, Any]] = []

    def on_log(step: int, steps: int, record: dict[str, Any]) -> None:
        records.append(record)
        if "loss" in record:
            on_step(step, steps, record["loss"])

    images = torch.zeros(BATCH_SIZE, 3, IMG_SIZE, IMG_SIZE, device=run.accelerator.device)
    kept = saved_bytes(run.model, lambda: run.model(images))
    start = time.perf_counter()
    if not run.train(on_log):
        raise SystemExit(143)  # of SIGTERM
    seconds = time.perf_counter() - start
    losses = [record["loss"] for record in records if "loss" in record]
    return Trained(losses, records[-1]["val_accuracy"], seconds, kept)


def loss_differences(results: dict[str, Trained]) -> list[float]:
    """Absolute, a step."""
    return [abs(a - b) for a, b in zip(results["stock"].losses, results["swapped"].losses, strict=True)]
