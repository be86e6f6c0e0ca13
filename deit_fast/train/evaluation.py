"""How good a model is on images that it did not learn from."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader


class Evaluation(NamedTuple):
    """Means over the images; accuracy: the share whose likeliest class is right."""

    loss: float
    accuracy: float


def evaluate(
    model: nn.Module, loader: DataLoader, accelerator: Accelerator, stopping: Callable[[], bool] = lambda: False
) -> Evaluation | None:
    """Mean loss and accuracy over `loader` of all processes, or None where it has been told to stop."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    for images, labels in loader:
        if stopping():
            return None
        labels = labels.to(accelerator.device)
        with torch.inference_mode(), accelerator.autocast():
            logits = model(images.to(accelerator.device)).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(-1) == labels).sum()
        sums += torch.stack([loss.double(), right.double(), right.new_tensor(len(labels)).double()])
    loss, right, images = accelerator.reduce(sums).tolist()
    return Evaluation(loss / images, right / images)
