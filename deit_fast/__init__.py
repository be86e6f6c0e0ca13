"""Fused Triton kernels that make DeiT and ViT models train and infer faster, with the same numbers coming out."""

__version__ = "0.1.0"

from deit_fast import nn, ops
from deit_fast.data import DeiTImageProcessor
from deit_fast.models import create_model, list_models

__all__ = ["DeiTImageProcessor", "create_model", "list_models", "nn", "ops"]
