"""A small training loop: AdamW, cosine schedule with warm-up, and a stop where the loss is not finite."""

import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn


def train(
    model: nn.Module,
    criterion: Callable[[Tensor, Any, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.05,
    warmup_steps: int = 0,
    checkpoint: str | os.PathLike | None = None,
    metadata: Mapping[str, str] | None = None,
    save_every: int = 100,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` for `steps` batches and return the loss of each.

    Args:
        criterion: (inputs, outputs, labels) to the loss, a scalar, as `DistillationLoss` is called.
        batches: (inputs, labels) on the model's device; without end, or `steps` of them at least.
        lr: after `warmup_steps`, over which it rises linearly; from there it falls to 0 along a cosine.
        weight_decay: of all but vectors (biases, norms) and what `model.no_weight_decay()` names.
        checkpoint: a `.safetensors` file, written every `save_every` steps and after the last. It only ever holds
            weights that are finite and, but for the last, gave a finite loss.
        metadata: for the checkpoint.
        on_step: called with the step, from 1, and its loss.

    Raises:
        FloatingPointError: a loss, or the weights after the last step, are not finite; the message says the step
            and which checkpoint is kept.
        ValueError: an argument out of range, or too few batches.
    """
    _check(steps, lr, warmup_steps, save_every, checkpoint)
    optimizer = torch.optim.AdamW(_parameter_groups(model, weight_decay), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, warmup_steps))
    saved: int | None = None
    losses: list[float] = []
    model.train()
    # The range comes first: zip would take one batch more than there are steps.
    for step, (inputs, labels) in zip(range(1, steps + 1), batches, strict=False):
        loss = criterion(inputs, model(inputs), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss is {losses[-1]} at step {step} of {steps}{_kept(checkpoint, saved)}")
        # Before the update: these are the weights whose loss is known.
        if checkpoint is not None and step % save_every == 0 and _finite(model):
            _save(model, checkpoint, metadata)
            saved = step - 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, losses[-1])
    if len(losses) < steps:
        raise ValueError(f"there were {len(losses)} batches for {steps} steps")
    if not _finite(model):
        raise FloatingPointError(f"the weights are not finite after step {steps}{_kept(checkpoint, saved)}")
    if checkpoint is not None:
        _save(model, checkpoint, metadata)
    return losses


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """What the learning rate is multiplied by at `step`, from 0."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    return (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2


def _check(steps: int, lr: float, warmup_steps: int, save_every: int, checkpoint: str | os.PathLike | None) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr, the learning rate, must be positive, got {lr}")
    if not 0 <= warmup_steps < steps:
        raise ValueError(f"warmup_steps must be at least 0 and below steps, {steps}, got {warmup_steps}")
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise ValueError(f"checkpoint must be a .safetensors file, got {checkpoint}")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    exempt: Collection[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and name not in exempt else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def _finite(model: nn.Module) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _save(model: nn.Module, checkpoint: str | os.PathLike, metadata: Mapping[str, str] | None) -> None:
    # Written beside it and renamed: an interruption leaves the one from before.
    partial = f"{os.fspath(checkpoint)}.partial"
    save_model(model, partial, metadata=dict(metadata or {}))
    os.replace(partial, checkpoint)


def _kept(checkpoint: str | os.PathLike | None, saved: int | None) -> str:
    if checkpoint is None or saved is None:
        return "; training stopped, and no checkpoint had been saved"
    return f"; training stopped, and {os.fspath(checkpoint)} keeps the weights after step {saved}"
