"""Around a model on a GPU: kernels compiled ahead, launches captured in one graph, what is faster measured."""

from deit_fast.runtime.graph import graph
from deit_fast.runtime.tune import tune
from deit_fast.runtime.warmup import warmup

__all__ = ["graph", "tune", "warmup"]
