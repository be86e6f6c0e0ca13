"""Fused Triton kernels for DeiT and ViT models: drop-in, with the same numbers coming out."""

__version__ = "0.1.0"

from deit_fast import nn, ops
from deit_fast.data import DeiTImageProcessor
from deit_fast.models import create_model, list_models
from deit_fast.ops.backend import fused_export
from deit_fast.runtime import graph, tune, warmup
from deit_fast.swap import CallReport, SwapReport, restore, swap, swapped
from deit_fast.swap.core import report
from deit_fast.train.distillation import DistillationLoss

__all__ = [
    "CallReport",
    "DeiTImageProcessor",
    "DistillationLoss",
    "SwapReport",
    "create_model",
    "fused_export",
    "graph",
    "list_models",
    "nn",
    "ops",
    "report",
    "restore",
    "swap",
    "swapped",
    "tune",
    "warmup",
]
