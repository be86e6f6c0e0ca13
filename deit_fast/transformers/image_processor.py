"""transformers' image processor of DeiT, and the name that it had before."""

import warnings
from typing import Any

from transformers.models.deit import image_processing_deit


class DeiTImageProcessor(image_processing_deit.DeiTImageProcessor):
    """transformers' own in all it does. `deit_fast.DeiTImageProcessor` gives the same pixels without that library."""


class DeiTFeatureExtractor(DeiTImageProcessor):
    """The older name of `DeiTImageProcessor`; what it saves is an image processor's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "DeiTFeatureExtractor is the older name of DeiTImageProcessor: use that", FutureWarning, stacklevel=2
        )
        super().__init__(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "image_processor_type": "DeiTImageProcessor"}
