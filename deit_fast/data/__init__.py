"""Images in, `pixel_values` out."""

from deit_fast.data.image_processor import DeiTImageProcessor
from deit_fast.data.images import load_image
from deit_fast.data.pixel_values import PixelValues

__all__ = ["DeiTImageProcessor", "PixelValues", "load_image"]
