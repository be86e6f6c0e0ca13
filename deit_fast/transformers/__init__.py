"""transformers' DeiT and ViT classes under their own names, born swapped.

Importing it registers the attention implementation "deit_fast" with transformers.
"""

from typing import Any

from deit_fast._extras import require

require("transformers", extra="transformers")

from transformers.models.deit.configuration_deit import DeiTConfig  # noqa: E402
from transformers.models.vit.configuration_vit import ViTConfig  # noqa: E402

import deit_fast.swap.transformers  # noqa: E402  (first: it says which release is too old)
import deit_fast.transformers.attention  # noqa: E402, F401  (registers itself)
from deit_fast.transformers.distillation import (  # noqa: E402
    DeiTForImageClassificationWithTeacher,
    DeiTForImageClassificationWithTeacherOutput,
    TeacherInputs,
)
from deit_fast.transformers.models import (  # noqa: E402
    DeiTForImageClassification,
    DeiTForMaskedImageModeling,
    DeiTModel,
    ViTForImageClassification,
    ViTModel,
)

__all__ = [
    "DeiTConfig",
    "DeiTFeatureExtractor",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForImageClassificationWithTeacherOutput",
    "DeiTForMaskedImageModeling",
    "DeiTImageProcessor",
    "DeiTImageProcessorFast",
    "DeiTImageProcessorPil",
    "DeiTModel",
    "TeacherInputs",
    "ViTConfig",
    "ViTForImageClassification",
    "ViTModel",
]


def __getattr__(name: str) -> Any:
    # Imported when they are asked for: transformers' image processors need torchvision, its models do not.
    if name in ("DeiTImageProcessor", "DeiTImageProcessorFast", "DeiTFeatureExtractor"):
        from deit_fast.transformers import image_processor

        return getattr(image_processor, name.removesuffix("Fast"))
    if name == "DeiTImageProcessorPil":  # transformers' own, which needs no torchvision
        from transformers import DeiTImageProcessorPil

        return DeiTImageProcessorPil
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
