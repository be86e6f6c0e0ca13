"""What the models return: transformers 4's outputs, with its names and in its order."""

from dataclasses import dataclass, fields

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class _Output(ModelOutput):
    def __post_init__(self) -> None:
        # transformers would look into a lone first value for pairs; Keras's symbolic tensors refuse that.
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


@dataclass
class TFBaseModelOutputWithPooling(_Output):
    """last_hidden_state: [B, N, D]; pooler_output: [B, D]."""

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TFMaskedImageModelingOutput(_Output):
    """loss: [1]; reconstruction: [B, C, H, W]."""

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TFImageClassifierOutput(_Output):
    """loss: [B], an entry an image; logits: [B, classes]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TFDeiTForImageClassificationWithTeacherOutput(_Output):
    """transformers' output of that name, with a loss, a scalar. logits: the average of the two heads', [B, classes]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
