"""Puts stock DeiT and ViT models of other libraries on the fused operators, in place, and takes them off again."""

from deit_fast.swap.calls import CallReport
from deit_fast.swap.core import restore, swap, swapped
from deit_fast.swap.report import SwapReport

__all__ = ["CallReport", "SwapReport", "restore", "swap", "swapped"]
