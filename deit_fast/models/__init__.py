"""The assembled DeiT: configurations by name, the model, and checkpoints of three libraries."""

from deit_fast.models.config import DeiTConfig
from deit_fast.models.deit import VisionTransformer
from deit_fast.models.loading import load_model
from deit_fast.models.registry import create_model, list_models

__all__ = ["DeiTConfig", "VisionTransformer", "create_model", "list_models", "load_model"]
