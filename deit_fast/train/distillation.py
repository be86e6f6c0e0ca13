"""Distillation from a teacher to a model with two heads, with the original DeiT repository's formulas."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deit_fast.ops import loss as ops

DISTILLATION_TYPES = ("none", "soft", "hard")


class _CrossEntropy(NamedTuple):
    """A base criterion that the fused operator computes. soft_targets: whether it takes them, or labels only."""

    label_smoothing: float
    ignore_index: int | None
    labels: bool
    soft_targets: bool


def _as_cross_entropy(criterion: nn.Module) -> _CrossEntropy | None:
    """What the fused operator needs to know of `criterion`, or None where it is anything but plain cross-entropy.

    Exact classes only, with no hooks: whatever else a user has put in is called as it is.
    """
    if "forward" in vars(criterion) or criterion._forward_hooks or criterion._forward_pre_hooks:
        return None
    if criterion._backward_hooks or criterion._backward_pre_hooks:
        return None
    kind = type(criterion)
    if kind is nn.CrossEntropyLoss:
        if criterion.weight is not None or criterion.reduction != "mean":
            return None
        return _CrossEntropy(criterion.label_smoothing, criterion.ignore_index, labels=True, soft_targets=True)
    if kind.__module__.split(".")[0] == "timm":
        if kind.__name__ == "LabelSmoothingCrossEntropy":
            smoothing: Any = criterion.smoothing
            return _CrossEntropy(smoothing, None, labels=True, soft_targets=False)
        if kind.__name__ == "SoftTargetCrossEntropy":
            return _CrossEntropy(0.0, None, labels=False, soft_targets=True)
    return None


class DistillationLoss(nn.Module):
    """`(1 - alpha) * base_criterion(logits, labels) + alpha * distillation(dist_logits, teacher_model(inputs))`.

    Formulas: `losses.py` of facebookresearch/deit (arXiv 2012.12877, section 4).

    - "none": the base criterion alone, on the class head.
    - "soft": `tau**2 * KL(softmax(teacher / tau) || softmax(dist / tau))`, averaged over all B * C elements.
    - "hard": cross-entropy of the distillation head with the teacher's most likely class; tau plays no part.

    base_criterion: any callable module of (logits [B, C], labels). Where it is plain cross-entropy
    (`nn.CrossEntropyLoss` without class weights, timm's `LabelSmoothingCrossEntropy` or `SoftTargetCrossEntropy`), one
    fused operator gives the loss and both gradients.
    teacher_model: inputs -> logits [B, C], as a tensor or an object with `.logits`; put into evaluation mode,
    with a warning, kept there, and called without gradients. Only "none" may do without one (None).

    Labels out of range raise ValueError on the CPU; on a GPU, where looking would wait for it, they make a fused loss
    NaN.

    Raises:
        ValueError: an unknown type, alpha outside [0, 1], tau not positive, no teacher.
    """

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise ValueError(f"distillation_type must be one of {DISTILLATION_TYPES}, got {distillation_type!r}")
        ops.check_weights(alpha, tau)
        if teacher_model is None and distillation_type != "none":
            raise ValueError(f"distillation_type={distillation_type!r} needs a teacher_model, got None")
        if teacher_model is not None:
            ops.evaluating(teacher_model)
        self.base_criterion = base_criterion
        self.teacher_model: Any = teacher_model
        self.distillation_type = distillation_type
        self.alpha = alpha
        self.tau = tau
        self.train(self.training)

    def train(self, mode: bool = True) -> "DistillationLoss":
        super().train(mode)
        if self.teacher_model is not None:
            self.teacher_model.eval()
        return self

    def forward(self, inputs: Tensor, outputs: object, labels: Tensor) -> Tensor:
        """The loss, a scalar.

        inputs: what the teacher is given. outputs: of the model in training: logits [B, C], or (class logits,
        distillation logits), or transformers' output object. labels: what the base criterion takes.

        Raises:
            ValueError: one head where distillation needs two, a teacher with other classes, labels out of range.
        """
        logits, dist_logits = _heads(outputs)
        plain = _as_cross_entropy(self.base_criterion) if logits.ndim == 2 else None
        if plain is not None:
            _check_labels(plain, type(self.base_criterion).__name__, logits, labels)
        if self.distillation_type == "none":
            return self.base_criterion(logits, labels)
        if dist_logits is None:
            raise ValueError(
                f"distillation_type={self.distillation_type!r} needs the outputs of two heads, (class logits, "
                f"distillation logits), but the model returned one. Use a distilled model in training mode: "
                f"'deit_tiny_distilled_patch16_224' or its small or base sibling (timm: after "
                f"model.set_distilled_training(True); transformers: DeiTForImageClassificationWithTeacher)"
            )
        teacher_logits = self._teacher_logits(inputs, dist_logits)
        if plain is not None:
            return ops.distillation_loss(
                logits,
                dist_logits,
                labels,
                teacher_logits,
                self.distillation_type,
                self.alpha,
                self.tau,
                plain.label_smoothing,
                plain.ignore_index,
            )
        distillation = ops.stock_distillation(dist_logits, teacher_logits, self.distillation_type, self.tau)
        return (1 - self.alpha) * self.base_criterion(logits, labels) + self.alpha * distillation

    def _teacher_logits(self, inputs: Tensor, dist_logits: Tensor) -> Tensor:
        with torch.no_grad():
            answer = self.teacher_model(inputs)
        logits = getattr(answer, "logits", answer)
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the teacher must return its logits as a tensor or an object with .logits, got {type(answer).__name__}"
            )
        if logits.shape != dist_logits.shape:
            raise ValueError(
                f"the teacher returned logits of shape {list(logits.shape)}, the student's distillation head "
                f"{list(dist_logits.shape)}: use a teacher with the student's {dist_logits.shape[-1]} classes"
            )
        return logits.detach()


def _heads(outputs: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(outputs, Tensor):
        return outputs, None
    if hasattr(outputs, "cls_logits"):
        return outputs.cls_logits, outputs.distillation_logits
    if hasattr(outputs, "logits"):
        return outputs.logits, None
    if isinstance(outputs, tuple | list) and len(outputs) == 2:
        return outputs[0], outputs[1]
    raise TypeError(
        f"outputs must be logits, (class logits, distillation logits) or a transformers output, "
        f"got {type(outputs).__name__}" + (f" of {len(outputs)}" if isinstance(outputs, tuple | list) else "")
    )


def _check_labels(plain: _CrossEntropy, name: str, logits: Tensor, labels: Tensor) -> None:
    soft = labels.is_floating_point()
    if soft and not plain.soft_targets:
        raise ValueError(
            f"{name} takes class labels [batch], got soft targets {list(labels.shape)} "
            f"(from mixup?): use timm's SoftTargetCrossEntropy or nn.CrossEntropyLoss"
        )
    if not soft and not plain.labels:
        raise ValueError(
            f"{name} takes soft targets [batch, classes] of a floating dtype, got {labels.dtype} "
            f"{list(labels.shape)}: use nn.CrossEntropyLoss for class labels"
        )
    if not soft:
        ops.check_labels(labels, logits.shape[1], plain.ignore_index)
