"""How a model with two heads learns from a teacher, whichever library's class it is."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from deit_fast.ops.loss import check_weights, distillation_loss, evaluating, stock_distillation

IGNORED = -100  # a label that Trainer and cross-entropy leave out
_KINDS = ("hard", "soft", "none")
_REMEDY = "give teacher_classes, the teacher's number for each class of the model"


def check_distillation(
    config: Any,
    teacher: Module | None,
    distillation: str,
    alpha: float,
    tau: float,
    teacher_classes: Sequence[int] | None,
) -> None:
    """Puts the teacher into evaluation mode.

    Raises:
        ValueError: an unknown `distillation`, alpha outside [0, 1], tau not positive, a teacher with other classes.
    """
    if distillation not in _KINDS:
        raise ValueError(f"distillation must be one of {_KINDS}, got {distillation!r}")
    check_weights(alpha, tau)
    if teacher_classes is not None and len(teacher_classes) != config.num_labels:
        raise ValueError(f"teacher_classes must have {config.num_labels} entries, got {len(teacher_classes)}")
    if teacher is not None:
        if teacher_classes is None:
            _check_classes(config, teacher)
        evaluating(teacher)


class Distilling:
    """A model's part of it. The names are those of the classes' constructors."""

    num_labels: int
    teacher: Module | None
    distillation: str
    alpha: float
    tau: float
    teacher_inputs: Callable[[Tensor], Tensor] | None
    teacher_classes: Tensor | None

    def _distilled_loss(
        self,
        cls_logits: Tensor,
        dist_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor,
        base_loss: Callable[[], Tensor] | None,
    ) -> Tensor:
        """base_loss: of the class head, unless it is cross-entropy over classes."""
        if base_loss is None:
            return distillation_loss(
                cls_logits,
                dist_logits,
                labels.view(-1),
                teacher_logits,
                self.distillation,
                self.alpha,
                self.tau,
                ignore_index=IGNORED,
            )
        distillation = stock_distillation(dist_logits, teacher_logits, self.distillation, self.tau)
        return (1 - self.alpha) * base_loss() + self.alpha * distillation

    def _teacher_logits(self, pixel_values: Any, given: Tensor | None) -> Tensor:
        logits = self._ask_teacher(pixel_values) if given is None else given
        if self.teacher_classes is not None:
            return logits[:, self.teacher_classes.to(logits.device, non_blocking=True)]
        if logits.shape[-1] != self.num_labels:
            raise ValueError(f"the teacher has {logits.shape[-1]} classes and the model {self.num_labels}: {_REMEDY}")
        return logits

    def _ask_teacher(self, pixel_values: Tensor) -> Tensor:
        teacher = self.teacher
        if teacher is None:
            raise ValueError(
                f"distillation={self.distillation!r} needs a teacher at construction or teacher_logits in the call; "
                f"distillation='none' trains the class head alone"
            )
        evaluating(teacher)
        # A Keras model's may begin with a dropout's seed.
        parameter = next((each for each in teacher.parameters() if each.is_floating_point()), pixel_values)
        placed = hasattr(teacher, "hf_device_map") or isinstance(teacher, nn.DataParallel)  # by those who made it
        if parameter.device != pixel_values.device and not placed:
            if getattr(self, "_is_replica", False):
                raise RuntimeError(
                    "nn.DataParallel's copies of the model share one teacher, which is on one GPU: wrap the teacher in "
                    "nn.DataParallel, give teacher_logits, or start one process for each GPU (torchrun)"
                )
            teacher.to(pixel_values.device)
        # A compiled graph holds the student's gradients, too, and knows no inference mode.
        with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode():
            images = pixel_values if self.teacher_inputs is None else self.teacher_inputs(pixel_values)
            answer = self._call_teacher(images.to(parameter.dtype))
        # A tensor of inference mode can't be saved for backward.
        return getattr(answer, "logits", answer).clone()

    def _call_teacher(self, images: Tensor) -> Any:
        teacher: Any = self.teacher
        return teacher(images)


def _check_classes(config: Any, teacher: Module) -> None:
    """Raises where the two have other numbers of classes, or other names for them; a name LABEL_0 says nothing."""
    teacher = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    known = getattr(teacher, "config", None)
    theirs, ours = getattr(known, "id2label", None), config.id2label
    count = len(theirs) if theirs else getattr(teacher, "num_classes", None)
    if count is not None and count != config.num_labels:
        raise ValueError(f"the teacher has {count} classes and the model {config.num_labels}: {_REMEDY}")
    if not theirs or "LABEL_0" in (theirs.get(0), ours.get(0)):
        return
    for number, name in ours.items():
        if theirs.get(number) != name:
            raise ValueError(
                f"class {number} is {theirs.get(number)!r} to the teacher and {name!r} to the model: {_REMEDY}"
            )
