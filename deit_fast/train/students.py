"""A distilled DeiT that learns handwritten digits, stock or swapped, from one seed."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import deit_fast
from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.models import DeiTConfig
from deit_fast.models.description import to_metadata
from deit_fast.train import digits
from deit_fast.train.loop import train
from deit_fast.train.teacher import conv_net

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
BATCH_SIZE = 64
TEACHER_STEPS = 100
STUDENT_STEPS = 200
TEACHER_LEARNING_RATE = 3e-3
STUDENT_LEARNING_RATE = 2e-3
# timm's 0.02 is small beside patches of unit scale: the model would look past their positions for hundreds of steps.
POSITIONS_STD = 0.5
ALPHA = 0.5
SAVE_EVERY = 100

# Gets the number of a step and its loss.
OnStep = Callable[[int, float], None]


class Trained(NamedTuple):
    """Of one training: the loss of each step, accuracy on the test digits, and what it took."""

    losses: list[float]
    accuracy: float
    seconds: float
    saved_bytes: int


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
    positions: Any = model.pos_embed
    nn.init.normal_(positions, std=POSITIONS_STD)
    model.set_distilled_training(True)
    return model


def train_teacher(split: digits.Split, on_step: OnStep) -> nn.Module:
    """A convolutional network that has learnt the digits."""
    torch.manual_seed(SEED)
    teacher = conv_net(digits.CLASSES).to(split.images.device)
    train(
        teacher,
        lambda inputs, logits, labels: F.cross_entropy(logits, labels),
        digits.batches(split, BATCH_SIZE, SEED),
        steps=TEACHER_STEPS,
        lr=TEACHER_LEARNING_RATE,
        warmup_steps=TEACHER_STEPS // 10,
        on_step=on_step,
    )
    return teacher.eval()


def train_student(
    teacher: nn.Module,
    train_split: digits.Split,
    test_split: digits.Split,
    checkpoint: Path,
    on_step: OnStep,
    swapped: bool,
) -> Trained:
    """Train the stock or the swapped DeiT from the same weights on the same batches, and save it as `checkpoint`."""
    device = train_split.images.device
    model = build_student().to(device)
    if swapped:
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
        lr=STUDENT_LEARNING_RATE,
        warmup_steps=STUDENT_STEPS // 10,
        checkpoint=checkpoint,
        metadata=to_metadata(CONFIG, digits.image_processor().to_dict()),
        save_every=SAVE_EVERY,
        on_step=on_step,
    )
    seconds = time.perf_counter() - start
    return Trained(losses, accuracy(model, test_split), seconds, kept)


@torch.inference_mode()
def accuracy(model: nn.Module, split: digits.Split) -> float:
    """Share of the digits whose likeliest class is right; leaves the model in evaluation mode."""
    return (model.eval()(split.images).argmax(-1) == split.labels).double().mean().item()


def loss_differences(results: dict[str, Trained]) -> list[float]:
    """Absolute, a step."""
    return [abs(a - b) for a, b in zip(results["stock"].losses, results["swapped"].losses, strict=True)]
