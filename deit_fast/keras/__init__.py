"""transformers 4's TensorFlow classes of DeiT, as Keras 3 models on PyTorch whose modules are swapped.

Importing it sets KERAS_BACKEND=torch where keras is not imported yet and the environment has no KERAS_BACKEND; it
overrides ~/.keras/keras.json.
"""

from deit_fast._extras import require
from deit_fast.keras.backend import require_keras

require_keras()
require("transformers", extra="keras")

from transformers.models.deit.configuration_deit import DeiTConfig  # noqa: E402

import deit_fast.swap.transformers  # noqa: E402, F401  (says which release is too old)
from deit_fast.keras.models import (  # noqa: E402
    TFDeiTForImageClassification,
    TFDeiTForMaskedImageModeling,
    TFDeiTModel,
    TFDeiTPreTrainedModel,
)
from deit_fast.keras.outputs import (  # noqa: E402
    TFBaseModelOutputWithPooling,
    TFDeiTForImageClassificationWithTeacherOutput,
    TFImageClassifierOutput,
    TFMaskedImageModelingOutput,
)
from deit_fast.keras.with_teacher import TFDeiTForImageClassificationWithTeacher  # noqa: E402

__all__ = [
    "DeiTConfig",
    "TFBaseModelOutputWithPooling",
    "TFDeiTForImageClassification",
    "TFDeiTForImageClassificationWithTeacher",
    "TFDeiTForImageClassificationWithTeacherOutput",
    "TFDeiTForMaskedImageModeling",
    "TFDeiTModel",
    "TFDeiTPreTrainedModel",
    "TFImageClassifierOutput",
    "TFMaskedImageModelingOutput",
]
