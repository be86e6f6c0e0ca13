"""Around a model on a GPU: its kernels compiled before they are needed, its launches captured in one graph."""

from deit_fast.runtime.graph import graph
from deit_fast.runtime.warmup import warmup

__all__ = ["graph", "warmup"]
