"""The models' own losses: of labels as transformers' PyTorch classes have them, of masks as its TensorFlow class."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.ops.distilling import IGNORED

CLASSES = "single_label_classification"


def problem_of(labels: Tensor, config: Any) -> str:
    """`config.problem_type`, or what transformers' PyTorch classes take it to be where it isn't said."""
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.ndim > 1 and labels.is_floating_point() else CLASSES


def classification_losses(logits: Tensor, labels: Tensor, config: Any) -> Tensor:
    """[B]: an entry an image. Cross-entropy, binary cross-entropy or squared error, in float32 at least.

    Cross-entropy is 0 where the label is -100.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device)
    problem = problem_of(labels, config)
    if problem == CLASSES:
        return F.cross_entropy(logits, labels.reshape(-1).long(), reduction="none", ignore_index=IGNORED)
    labels = labels.to(logits.dtype).view_as(logits)
    if problem == "regression":
        return F.mse_loss(logits, labels, reduction="none").mean(1)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)


def average(losses: Tensor, labels: Tensor | None, config: Any) -> Tensor:
    """[]: over the images whose labels count, as PyTorch's cross-entropy; where none does, 0."""
    if labels is None or losses.ndim == 0 or problem_of(labels, config) != CLASSES:
        return losses.mean()
    return losses.sum() / (labels != IGNORED).sum().clamp(min=1).to(losses.device)


def masked_image_loss(images: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor) -> Tensor:
    """[1]: the absolute error, averaged over the batch, under the masks, divided by the number of masked pixels.

    images, reconstruction: [B, C, H, W]; bool_masked_pos: [B, patches]. The average comes before the masks, as in
    transformers' TensorFlow class and not in its PyTorch one; for one image they are the same.
    """
    side = math.isqrt(bool_masked_pos.shape[-1])
    mask = bool_masked_pos.reshape(-1, 1, side, side).to(torch.float32)
    mask = F.interpolate(mask, images.shape[2:])
    error = (images - reconstruction).abs().float().mean(0, keepdim=True)
    return ((error * mask).sum() / ((mask.sum() + 1e-5) * images.shape[1])).reshape(1)
