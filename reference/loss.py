"""Distillation through attention's two objectives (DeiT, arXiv 2012.12877, section 4, equations 2 and 3)."""

import torch
from torch import Tensor


def log_softmax(x: Tensor) -> Tensor:
    """x − log Σ exp(x) over the last dimension, with the largest element taken out first."""
    x = x - x.amax(dim=-1, keepdim=True)
    return x - x.exp().sum(dim=-1, keepdim=True).log()


def cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, ignore_index: int | None = None
) -> Tensor:
    """Mean over the rows of −Σ_c q_c log p_c, with p = softmax(logits) and q = (1 − ε) · target + ε/C.

    logits: [B, C]; targets: soft [B, C], or classes [B], which stand for one-hot rows. Rows of class
    `ignore_index` count neither in the sum nor in the mean.
    """
    classes = logits.shape[-1]
    kept = torch.ones(len(logits), dtype=torch.bool)
    if not targets.is_floating_point():
        if ignore_index is not None:
            kept = targets != ignore_index
        targets = (targets[:, None] == torch.arange(classes)).to(logits.dtype)
    q = (1 - label_smoothing) * targets + label_smoothing / classes
    rows = torch.where(q == 0, 0.0, q * log_softmax(logits)).sum(dim=-1)
    return -rows[kept].sum() / kept.sum()


def distillation_loss(
    logits: Tensor,
    dist_logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    distillation_type: str,
    alpha: float,
    tau: float,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """(1 − α) · cross_entropy(logits, targets) + α · distillation(dist_logits, teacher_logits).

    "hard": cross-entropy with the class that the teacher finds most likely.
    "soft": τ² · KL(softmax(teacher / τ) ‖ softmax(dist / τ)), averaged over all B · C elements, not over the B rows,
    as the original code does (the paper's equation 2 leaves the mean open).

    logits, dist_logits, teacher_logits: [B, C]; targets: [B] or [B, C].
    """
    base = cross_entropy(logits, targets, label_smoothing, ignore_index)
    if distillation_type == "hard":
        distillation = cross_entropy(dist_logits, teacher_logits.argmax(dim=-1))
    else:
        student, teacher = log_softmax(dist_logits / tau), log_softmax(teacher_logits / tau)
        distillation = tau**2 * (teacher.exp() * (teacher - student)).sum() / dist_logits.numel()
    return (1 - alpha) * base + alpha * distillation
