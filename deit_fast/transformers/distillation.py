"""DeiT with two heads, which learns from labels and from a teacher."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Module
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.models.deit import modeling_deit
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from deit_fast.ops.loss import check_weights, distillation_loss, evaluating, stock_distillation
from deit_fast.transformers.models import BornSwapped, swapped_class

_IGNORED = -100  # a label that Trainer and cross-entropy leave out
_KINDS = ("hard", "soft", "none")


@dataclass
class DeiTForImageClassificationWithTeacherOutput(ModelOutput):
    """transformers' output of that name, with a loss. logits: the average of the two heads', all three [B, classes]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


_Stock: Any = swapped_class(modeling_deit.DeiTForImageClassificationWithTeacher)


class DeiTForImageClassificationWithTeacher(BornSwapped, _Stock):
    """transformers' class, which also trains.

    In training, with `labels`, the loss is `deit_fast.DistillationLoss`'s:
    `(1 - alpha) * base(cls_logits, labels) + alpha * distillation(distillation_logits, teacher's logits)`. In
    evaluation it is the base loss of the average, and the teacher isn't asked. The base loss is transformers' for
    `config.problem_type`: cross-entropy, binary cross-entropy or squared error.

    teacher: `pixel_values` to logits [B, its classes], as a tensor or an object with `.logits`. It is put into
    evaluation mode, called in inference mode, on the device of `pixel_values`, and is no part of the model: not of its
    parameters, its `state_dict` or what it saves. Instead, each call may be given `teacher_logits`.
    distillation: "hard", "soft", or "none", which trains the class head alone.
    alpha: the distillation's weight. tau: the temperature of "soft".
    teacher_inputs: makes the teacher's images of `pixel_values`, such as `TeacherInputs`.
    teacher_classes: for each class of the model, the teacher's number for it; by default the same number.

    Raises:
        ValueError: an unknown `distillation`, alpha outside [0, 1], tau not positive, a teacher with other classes;
            in training with labels, no teacher where one is needed.
    """

    __module__ = modeling_deit.__name__

    def __init__(
        self,
        config: Any,
        teacher: Module | None = None,
        distillation: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher_inputs: Callable[[Tensor], Tensor] | None = None,
        teacher_classes: Sequence[int] | None = None,
    ) -> None:
        if distillation not in _KINDS:
            raise ValueError(f"distillation must be one of {_KINDS}, got {distillation!r}")
        check_weights(alpha, tau)
        if teacher_classes is not None and len(teacher_classes) != config.num_labels:
            raise ValueError(f"teacher_classes must have {config.num_labels} entries, got {len(teacher_classes)}")
        if teacher is not None:
            if teacher_classes is None:
                _check_classes(config, teacher)
            evaluating(teacher)
        super().__init__(config)
        self.teacher = teacher
        self.distillation = distillation
        self.alpha = alpha
        self.tau = tau
        self.teacher_inputs = teacher_inputs
        # On the CPU even where the model is built on the meta device.
        self.teacher_classes = None if teacher_classes is None else torch.tensor(list(teacher_classes), device="cpu")
        # So that Trainer's predictions are the logits alone.
        config.keys_to_ignore_at_inference = ["cls_logits", "distillation_logits"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("teacher", "teacher_inputs"):  # no submodules
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> DeiTForImageClassificationWithTeacherOutput:
        """As stock's.

        labels: as `DeiTForImageClassification` takes them. teacher_logits: [B, the teacher's classes].
        num_items_in_batch: how many labels all batches of one step have (`Trainer` gives it when it accumulates
        gradients): the loss is then this batch's part of the step's.
        """
        outputs = super().forward(pixel_values, interpolate_pos_encoding, attention_mask, return_dict=True, **kwargs)
        loss = None
        if labels is not None:
            loss = self._loss(outputs, labels, pixel_values, teacher_logits)
            if num_items_in_batch is not None:
                loss = loss * ((labels != _IGNORED).sum() / num_items_in_batch)
        elif self.training and (self.teacher is not None or teacher_logits is not None):
            warnings.warn(
                "a teacher without labels gives no loss: Trainer's label_smoothing_factor and compute_loss_func take "
                "the labels away, and nothing is distilled",
                stacklevel=2,
            )
        return DeiTForImageClassificationWithTeacherOutput(loss=loss, **outputs)

    def _loss(self, outputs: Any, labels: Tensor, pixel_values: Any, teacher_logits: Tensor | None) -> Tensor:
        if not self.training:
            return self.loss_function(labels, outputs.logits, self.config)
        cls_logits, dist_logits = outputs.cls_logits, outputs.distillation_logits
        if self.distillation == "none":
            return self.loss_function(labels, cls_logits, self.config)
        labels = labels.to(cls_logits.device)
        teacher_logits = self._teacher_logits(pixel_values, teacher_logits).to(cls_logits.device)
        if self._cross_entropy(labels):
            return distillation_loss(
                cls_logits,
                dist_logits,
                labels.view(-1),
                teacher_logits,
                self.distillation,
                self.alpha,
                self.tau,
                ignore_index=_IGNORED,
            )
        base = self.loss_function(labels, cls_logits, self.config)
        distillation = stock_distillation(dist_logits, teacher_logits, self.distillation, self.tau)
        return (1 - self.alpha) * base + self.alpha * distillation

    def _cross_entropy(self, labels: Tensor) -> bool:
        """Whether transformers' loss would be that of classes; where the kind isn't said, it looks at the labels."""
        kind = self.config.problem_type
        if self.loss_function is not ForSequenceClassificationLoss:
            return False
        if kind is None:
            return self.num_labels > 1 and labels.dtype in (torch.long, torch.int)
        return kind == "single_label_classification"

    def _teacher_logits(self, pixel_values: Any, given: Tensor | None) -> Tensor:
        logits = self._ask_teacher(pixel_values) if given is None else given
        if self.teacher_classes is not None:
            return logits[:, self.teacher_classes.to(logits.device, non_blocking=True)]
        if logits.shape[-1] != self.num_labels:
            raise ValueError(
                f"the teacher has {logits.shape[-1]} classes and the model {self.num_labels}: give teacher_classes, "
                f"the teacher's number for each class of the model"
            )
        return logits

    def _ask_teacher(self, pixel_values: Tensor) -> Tensor:
        teacher = self.teacher
        if teacher is None:
            raise ValueError(
                f"distillation={self.distillation!r} needs a teacher at construction or teacher_logits in the call; "
                f"distillation='none' trains the class head alone"
            )
        evaluating(teacher)
        parameter = next(teacher.parameters(), pixel_values)
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
            answer = teacher(images.to(parameter.dtype))
        # A tensor of inference mode can't be saved for backward.
        return getattr(answer, "logits", answer).clone()


class TeacherInputs:
    """Makes a teacher's `pixel_values` [B, C, H', W'] of a student's [B, C, H, W].

    processor, teacher_processor: image processors of transformers' or this library's, or whatever has their
    `image_mean`, `image_std`, `size`, `crop_size` and `do_center_crop`. The normalisation becomes the teacher's, and
    where its size is another, the images are resized (bicubic, with antialiasing).

    Raises:
        ValueError: the teacher's size is neither height and width nor a shortest edge.
    """

    def __init__(self, processor: Any, teacher_processor: Any) -> None:
        mean, std, teacher_mean, teacher_std = (
            torch.tensor(value, dtype=torch.float32).view(-1, 1, 1)
            for each in (processor, teacher_processor)
            for value in (each.image_mean, each.image_std)
        )
        self.scale = std / teacher_std
        self.shift = (mean - teacher_mean) / teacher_std
        size = teacher_processor.crop_size if teacher_processor.do_center_crop else teacher_processor.size
        edge = size.get("shortest_edge")
        if not edge and not (size.get("height") and size.get("width")):
            raise ValueError(f"the teacher's size must be a height and width, or a shortest edge, got {dict(size)}")
        self.size = (edge, edge) if edge else (size["height"], size["width"])

    def __call__(self, pixel_values: Tensor) -> Tensor:
        scale, shift = (each.to(pixel_values, non_blocking=True) for each in (self.scale, self.shift))
        images = pixel_values * scale + shift
        if images.shape[-2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bicubic", antialias=True)


def _check_classes(config: Any, teacher: Module) -> None:
    """Raises where the two have other numbers of classes, or other names for them; a name LABEL_0 says nothing."""
    teacher = teacher.module if isinstance(teacher, nn.DataParallel) else teacher
    known = getattr(teacher, "config", None)
    theirs, ours = getattr(known, "id2label", None), config.id2label
    count = len(theirs) if theirs else getattr(teacher, "num_classes", None)
    remedy = "give teacher_classes, the teacher's number for each class of the model"
    if count is not None and count != config.num_labels:
        raise ValueError(f"the teacher has {count} classes and the model {config.num_labels}: {remedy}")
    if not theirs or "LABEL_0" in (theirs.get(0), ours.get(0)):
        return
    for number, name in ours.items():
        if theirs.get(number) != name:
            raise ValueError(
                f"class {number} is {theirs.get(number)!r} to the teacher and {name!r} to the model: {remedy}"
            )
