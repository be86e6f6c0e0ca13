"""Cross-entropy of one head and distillation of the other: the loss and both gradients in one launch.

A program takes a row of each head, of the targets and of the teacher. It reads them twice, the second time from
cache: first for the softmaxes' denominators, then for the loss and the gradients. It writes its share of the mean,
so that the sum over the rows is the loss and the same at every run.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from deit_fast.kernels.launching import run
from deit_fast.kernels.launching.layout import unit_stride
from deit_fast.kernels.launching.metadata import described

_LABEL_BLOCK = 256


@lru_cache(maxsize=64)
def loss_row(classes: int) -> tuple[int, int]:
    """Classes a step and warps, for a program that walks over one row of logits: 8 elements a thread."""
    block = min(2048, max(16, triton.next_power_of_2(classes)))
    return block, min(8, max(1, block // 256))


@triton.jit(
    **described(
        "distillation_loss_kernel",
        lambda a: (a["batch"], a["CLASSES"]),
        ("SOFT", "SOFT_TARGETS", "logits_grad_ptr", "dist_grad_ptr"),
    )
)
def distillation_loss_kernel(
    logits_ptr,  # [batch, CLASSES]
    dist_ptr,  # [batch, CLASSES]
    targets_ptr,  # [batch], int64, or with SOFT_TARGETS [batch, CLASSES]
    teacher_ptr,  # [batch, CLASSES]
    row_loss_ptr,  # [batch], float32
    logits_grad_ptr,  # [batch, CLASSES], float32, or None
    dist_grad_ptr,  # [batch, CLASSES], float32, or None
    batch,
    logits_stride,
    dist_stride,
    targets_stride,
    teacher_stride,
    ignore_index,
    base_weight,
    dist_weight,
    dist_grad_weight,
    tau,
    confidence,
    smoothing,
    SOFT: tl.constexpr,
    SOFT_TARGETS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
    LABEL_BLOCK: tl.constexpr,
):
    """`(1 - alpha) CE(logits, targets) + alpha D(dist, teacher)` with gradients (Touvron et al. 2021, equations 2, 3).

    SOFT: distillation by KL divergence, else by the teacher's class. SOFT_TARGETS: [B, C], else labels [B].

    base_weight, dist_weight: of the two losses' sums over the rows; base_weight is divided by the rows kept here.
    confidence, smoothing: smoothed targets are `confidence * target + smoothing`.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_row = logits_ptr + row * logits_stride
    dist_row = dist_ptr + row * dist_stride
    targets_row = targets_ptr + row * targets_stride
    teacher_row = teacher_ptr + row * teacher_stride

    # Softmax denominators, the teacher's class, the targets' sum.
    base_max, base_sum = -float("inf"), 0.0
    dist_max, dist_sum = -float("inf"), 0.0
    teacher_max, teacher_sum = -float("inf"), 0.0
    teacher_class = 0
    target_sum = 0.0
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < CLASSES
        x = tl.load(logits_row + column, mask=mask, other=-float("inf")).to(tl.float32)
        base_max, base_sum = _add_exponentials(base_max, base_sum, x)
        x = tl.load(dist_row + column, mask=mask, other=-float("inf")).to(tl.float32)
        teacher = tl.load(teacher_row + column, mask=mask, other=-float("inf")).to(tl.float32)
        if SOFT:
            dist_max, dist_sum = _add_exponentials(dist_max, dist_sum, x / tau)
            teacher_max, teacher_sum = _add_exponentials(teacher_max, teacher_sum, teacher / tau)
        else:
            dist_max, dist_sum = _add_exponentials(dist_max, dist_sum, x)
            # The first of equals, and NaN above all, as torch.argmax has it.
            teacher = tl.where(teacher != teacher, float("inf"), teacher)
            block_max = tl.max(teacher, axis=0)
            block_class = tl.min(tl.where(teacher == block_max, column, CLASSES), axis=0)
            teacher_class = tl.where(block_max > teacher_max, block_class, teacher_class)
            teacher_max = tl.maximum(teacher_max, block_max)
        if SOFT_TARGETS:
            target_sum += tl.sum(tl.load(targets_row + column, mask=mask, other=0.0).to(tl.float32), axis=0)

    # The weight of this row in the mean.
    label = 0
    kept = batch
    is_kept = True
    if SOFT_TARGETS:
        target_sum = target_sum * confidence + smoothing * CLASSES
    else:
        target_sum = 1.0
        label = tl.load(targets_row)
        if ignore_index is not None:
            kept = _count_kept(targets_ptr, targets_stride, batch, ignore_index, LABEL_BLOCK)
            is_kept = label != ignore_index
        # Nobody waits for the GPU to look at labels: one out of range makes the loss NaN.
        base_weight = tl.where((label < 0) | (label >= CLASSES), float("nan"), base_weight)
    # No row kept is 0 / 0, as the stock operator has it, but no gradient.
    base_weight = tl.where(is_kept, base_weight, 0.0) / kept
    base_grad_weight = tl.where(is_kept, base_weight, 0.0)

    base_loss = 0.0
    dist_loss = 0.0
    for start in range(0, CLASSES, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = column < CLASSES
        x = tl.load(logits_row + column, mask=mask, other=0.0).to(tl.float32)
        p, log_p = _softmax(x, base_max, base_sum)
        if SOFT_TARGETS:
            target = tl.load(targets_row + column, mask=mask, other=0.0).to(tl.float32)
            target = target * confidence + smoothing
            base_loss -= tl.sum(tl.where(mask, target * log_p, 0.0), axis=0)
        else:
            is_label = column == label
            target = tl.where(is_label, confidence + smoothing, smoothing)
            # Apart from the target, so that a class without any weight may have a logit of -inf.
            base_loss -= confidence * tl.sum(tl.where(is_label, log_p, 0.0), axis=0)
            if SMOOTHING:
                base_loss -= smoothing * tl.sum(tl.where(mask, log_p, 0.0), axis=0)
        if logits_grad_ptr is not None:
            gradient = (p * target_sum - target) * base_grad_weight
            tl.store(logits_grad_ptr + row * CLASSES + column, gradient, mask=mask)

        x = tl.load(dist_row + column, mask=mask, other=0.0).to(tl.float32)
        if SOFT:
            teacher = tl.load(teacher_row + column, mask=mask, other=0.0).to(tl.float32)
            p, log_p = _softmax(x / tau, dist_max, dist_sum)
            target, teacher_log_p = _softmax(teacher / tau, teacher_max, teacher_sum)
            dist_loss += tl.sum(tl.where(mask, target * (teacher_log_p - log_p), 0.0), axis=0)
        else:
            p, log_p = _softmax(x, dist_max, dist_sum)
            target = tl.where(column == teacher_class, 1.0, 0.0)
            dist_loss -= tl.sum(tl.where(column == teacher_class, log_p, 0.0), axis=0)
        if dist_grad_ptr is not None:
            gradient = (p - target) * dist_grad_weight
            tl.store(dist_grad_ptr + row * CLASSES + column, gradient, mask=mask)

    base_loss = tl.where(is_kept, base_loss, 0.0)
    tl.store(row_loss_ptr + row, base_loss * base_weight + dist_loss * dist_weight)


@triton.jit
def _add_exponentials(maximum, total, x):
    """The running maximum and Σ exp(x − maximum), with the block `x` added."""
    larger = tl.maximum(maximum, tl.max(x, axis=0))
    # Nothing but -inf so far: -inf - -inf would be NaN.
    shift = tl.where(larger == -float("inf"), 0.0, larger)
    return larger, total * tl.exp(maximum - shift) + tl.sum(tl.exp(x - shift), axis=0)


@triton.jit
def _softmax(x, maximum, total):
    """Probabilities and their logarithms. The maximum goes first, so that large logits cost no digits; the
    probabilities do not come from the logarithms, which are rounded.
    """
    x -= tl.where(maximum == -float("inf"), 0.0, maximum)
    return tl.exp(x) / total, x - tl.log(total)


@triton.jit
def _count_kept(labels_ptr, stride, batch, ignore_index, BLOCK: tl.constexpr):
    """Every program counts all labels: a few kilobytes from cache, where a launch before this one would cost more."""
    kept = tl.zeros([BLOCK], dtype=tl.int32)
    for start in range(0, batch, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        mask = index < batch
        label = tl.load(labels_ptr + index * stride, mask=mask, other=0)
        kept += tl.where(mask & (label != ignore_index), 1, 0)
    return tl.sum(kept, axis=0)


def distillation_loss(
    logits: Tensor,
    dist_logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    distillation_type: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    ignore_index: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [], and the gradients that `needs` names of the two heads (else []), all in float32."""
    batch, classes = logits.shape
    device = logits.device
    of_logits, of_dist_logits = (
        torch.empty((batch, classes) if need else 0, dtype=torch.float32, device=device) for need in needs
    )
    if batch == 0:
        return torch.full((), torch.nan, device=device), of_logits, of_dist_logits
    row_loss = torch.empty(batch, dtype=torch.float32, device=device)
    soft, soft_targets = distillation_type == "soft", targets.is_floating_point()
    # KL divergence is averaged over all elements; its derivative by dist_logits has one factor of 1/tau.
    dist_weight = alpha * tau * tau / (batch * classes) if soft else alpha / batch
    logits, dist_logits, teacher_logits = unit_stride(logits), unit_stride(dist_logits), unit_stride(teacher_logits)
    targets = unit_stride(targets) if soft_targets else targets
    block, warps = loss_row(classes)
    run.run(
        distillation_loss_kernel,
        batch,
        device,
        logits,
        dist_logits,
        targets,
        teacher_logits,
        row_loss,
        of_logits if needs[0] else None,
        of_dist_logits if needs[1] else None,
        batch,
        logits.stride(0),
        dist_logits.stride(0),
        targets.stride(0),
        teacher_logits.stride(0),
        None if soft_targets else ignore_index,
        1.0 - alpha,
        dist_weight,
        dist_weight / tau if soft else dist_weight,
        tau,
        1.0 - label_smoothing,
        label_smoothing / classes,
        SOFT=soft,
        SOFT_TARGETS=soft_targets,
        SMOOTHING=label_smoothing > 0,
        CLASSES=classes,
        BLOCK=block,
        LABEL_BLOCK=_LABEL_BLOCK,
        num_warps=warps,
    )
    return row_loss.sum(), of_logits, of_dist_logits
