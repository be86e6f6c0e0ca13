"""DeiT with two heads, which learns from labels and from a teacher."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from transformers.loss.loss_utils import ForSequenceClassificationLoss
from transformers.models.deit import modeling_deit
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from deit_fast.ops.distilling import IGNORED, Distilling, check_distillation
from deit_fast.transformers.models import BornSwapped, swapped_class


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


class DeiTForImageClassificationWithTeacher(Distilling, BornSwapped, _Stock):
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
        check_distillation(config, teacher, distillation, alpha, tau, teacher_classes)
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
                loss = loss * ((labels != IGNORED).sum() / num_items_in_batch)
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
        base = None if self._cross_entropy(labels) else partial(self.loss_function, labels, cls_logits, self.config)
        return self._distilled_loss(cls_logits, dist_logits, labels, teacher_logits, base)

    def _cross_entropy(self, labels: Tensor) -> bool:
        """Whether transformers' loss would be that of classes; where the kind isn't said, it looks at the labels."""
        kind = self.config.problem_type
        if self.loss_function is not ForSequenceClassificationLoss:
            return False
        if kind is None:
            return self.num_labels > 1 and labels.dtype in (torch.long, torch.int)
        return kind == "single_label_classification"


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
