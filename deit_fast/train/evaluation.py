"""How good a model is on images that it did not learn from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from deit_fast.train.pixels import ByteImages
from deit_fast.train.reading import Batches


class Evaluation(NamedTuple):
    """Means over the images; accuracy: the share whose likeliest class is right, 0 where no classes are told."""

    loss: float
    accuracy: float


def right(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of logits [B, C] whether the likeliest class is the label, [B]; False for losses [B], which have no class."""
    return outputs.argmax(-1) == labels if outputs.ndim > 1 else torch.zeros_like(outputs, dtype=torch.bool)


def evaluate(
    model: nn.Module,
    loader: Batches,
    normalise: Callable[[ByteImages], Tensor],
    accelerator: Accelerator,
    stopping: Callable[[], bool] = lambda: False,
    blank: ByteImages | None = None,
) -> Evaluation | None:
    """Mean loss and accuracy over `loader` of all processes, or None where it has been told to stop.

    model: images -> logits [B, C], or the loss of each, [B]. normalise: what makes its images of the loader's.
    blank: an image, where all processes must call the model equally often: for each batch that this one lacks.
    """
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    batches = iter(loader)
    for _ in range(loader.rounds):  # of all processes: they ask together
        if stopping():
            return None
        batch = next(batches, None)
        if batch is None and blank is not None:
            batch = blank, torch.zeros(0, dtype=torch.long)
        if batch is None:
            continue
        byte_images, labels = batch
        images, labels = normalise(byte_images), labels.to(accelerator.device)
        # FSDP2's weights would stay inference tensors.
        with torch.no_grad(), accelerator.autocast():
            outputs = model(images).float()[: len(labels)]
            loss = F.cross_entropy(outputs, labels, reduction="sum") if outputs.ndim > 1 else outputs.sum()
        count = right(outputs, labels).sum()
        sums += torch.stack([loss.double(), count.double(), count.new_tensor(len(labels)).double()])
    loss, count, images = accelerator.reduce(sums).tolist()
    return Evaluation(loss / images, count / images)
