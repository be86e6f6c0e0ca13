"""What an image processor returns."""

from typing import Any

import torch
from torch import Tensor


class PixelValues(dict):
    """A mapping whose keys are attributes too: `pixel_values`, and what is added to it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def data(self) -> "PixelValues":
        """The mapping itself, where transformers' BatchFeature has its dict."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "PixelValues":
        """Moves and casts as `torch.Tensor.to(*args, **kwargs)` does, in place; returns itself.

        Tensors that are not floating-point, labels say, are moved and never cast. Lists and tuples are looked into;
        all else stays.

        Raises:
            ValueError: the first argument is neither a device nor a dtype.
        """
        device = kwargs.get("device")
        if device is None and args and not isinstance(args[0], torch.dtype):
            device = args[0]
            if not isinstance(device, str | int | torch.device):
                raise ValueError(f"expected a device or a dtype, got a {type(device).__name__}")

        def moved(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(moved(each) for each in value)
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            return value if device is None else value.to(device, non_blocking=kwargs.get("non_blocking", False))

        self.update({key: moved(value) for key, value in self.items()})
        return self
