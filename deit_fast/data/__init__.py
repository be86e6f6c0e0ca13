"""Images in, `pixel_values` out."""

from deit_fast.data.image_processor import DeiTImageProcessor, PixelValues
from deit_fast.data.images import load_image

__all__ = ["DeiTImageProcessor", "PixelValues", "load_image"]
