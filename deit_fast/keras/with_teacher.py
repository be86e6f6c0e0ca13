"""DeiT with two heads, which learns from labels and from a teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import torch
from torch import Tensor
from torch.nn import Module
from transformers.models.deit import modeling_deit
from transformers.models.deit.configuration_deit import DeiTConfig

from deit_fast.keras.layers import channels_first, returned
from deit_fast.keras.losses import CLASSES, average, classification_losses, problem_of
from deit_fast.keras.models import TFDeiTClassifier, registered
from deit_fast.keras.outputs import TFDeiTForImageClassificationWithTeacherOutput
from deit_fast.ops.distilling import Distilling, check_distillation


@registered
class TFDeiTForImageClassificationWithTeacher(Distilling, TFDeiTClassifier):
    """transformers 4's class, which also trains, as `deit_fast.transformers`' class for PyTorch does.

    In training its own loss is `(1 - alpha) * base(cls_logits, labels) + alpha * distillation(distillation_logits,
    teacher's logits)`. In evaluation it is the base loss of the average, and the teacher isn't asked. A loss that is
    given to `compile` takes its place: nothing is distilled.

    teacher: `pixel_values` [B, C, H, W] to logits [B, its classes], as a tensor or an object with `.logits`: a torch
    module or a Keras model. It is put into evaluation mode, called in inference mode, and no part of the model: not
    of its weights or of what it saves. Instead, each call may be given `teacher_logits`.
    distillation: "hard", "soft", or "none", which trains the class head alone.
    alpha: the distillation's weight. tau: the temperature of "soft".
    teacher_inputs: makes the teacher's images of `pixel_values`, such as `deit_fast.transformers.TeacherInputs`.
    teacher_classes: for each class of the model, the teacher's number for it; by default the same number.

    Raises:
        ValueError: an unknown `distillation`, alpha outside [0, 1], tau not positive, a teacher with other classes;
            in training with labels, no teacher where one is needed.
    """

    torch_class = modeling_deit.DeiTForImageClassificationWithTeacher
    heads = ("cls_classifier", "distillation_classifier")
    _apart = ("torch_model", "teacher", "teacher_inputs", "teacher_classes")
    _output_class = TFDeiTForImageClassificationWithTeacherOutput

    def __init__(
        self,
        config: DeiTConfig,
        teacher: Module | None = None,
        distillation: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher_inputs: Callable[[Tensor], Tensor] | None = None,
        teacher_classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(teacher, keras.Model):
            teacher.eval()  # they are born in training mode, which means nothing to them
        check_distillation(config, teacher, distillation, alpha, tau, teacher_classes)
        super().__init__(config, **kwargs)
        self.num_labels = config.num_labels or 0
        self.teacher = teacher
        self.distillation = distillation
        self.alpha = alpha
        self.tau = tau
        self.teacher_inputs = teacher_inputs
        self.teacher_classes = None if teacher_classes is None else torch.tensor(list(teacher_classes))

    def get_config(self) -> dict[str, Any]:
        own = {"distillation": self.distillation, "alpha": self.alpha, "tau": self.tau}
        classes = None if self.teacher_classes is None else self.teacher_classes.tolist()
        return {**super().get_config(), **own, "teacher_classes": classes}

    def call(
        self,
        pixel_values: Tensor,
        head_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
        labels: Tensor | None = None,
        teacher_logits: Tensor | None = None,
    ) -> TFDeiTForImageClassificationWithTeacherOutput | tuple[Any, ...]:
        """pixel_values: [B, C, H, W] or [B, H, W, C]; labels: [B]; teacher_logits: [B, the teacher's classes]."""
        outputs = self.classify(
            pixel_values, head_mask, output_attentions, output_hidden_states, interpolate_pos_encoding, training
        )
        loss = None
        if labels is not None:
            x = {"pixel_values": pixel_values, "teacher_logits": teacher_logits}
            loss = average(self._loss_of(x, labels, outputs, training), labels, self.config)
        answer = TFDeiTForImageClassificationWithTeacherOutput(loss=loss, **outputs)
        return returned(answer, self.config, return_dict)

    def _ask_teacher(self, pixel_values: Tensor) -> Tensor:
        if isinstance(self.teacher, keras.Model):
            self.teacher.eval()  # as in the constructor, for one that was set since
        return super()._ask_teacher(pixel_values)

    def _call_teacher(self, images: Tensor) -> Any:
        if not isinstance(self.teacher, keras.Model):
            return super()._call_teacher(images)
        return self.teacher(images, training=False)  # inside a call of this model it would train, too

    def _loss_of(self, x: Mapping[str, Any], y: Tensor, outputs: Any, training: bool) -> Tensor:
        if not training:
            return classification_losses(outputs.logits, y, self.config)
        cls_logits, dist_logits = outputs.cls_logits, outputs.distillation_logits
        if self.distillation == "none":
            return classification_losses(cls_logits, y, self.config)
        images = channels_first(x["pixel_values"], self.config.num_channels)
        labels = y.to(cls_logits.device)
        teacher_logits = self._teacher_logits(images, x.get("teacher_logits")).to(cls_logits.device)
        if problem_of(labels, self.config) == CLASSES:
            return self._distilled_loss(cls_logits, dist_logits, labels.long(), teacher_logits, None)
        return self._distilled_loss(
            cls_logits,
            dist_logits,
            labels,
            teacher_logits,
            lambda: classification_losses(cls_logits, labels, self.config).mean(),
        )
