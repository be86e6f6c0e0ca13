"""Attention over all tokens."""

from deit_fast.kernels.attention.backward import attention_backward
from deit_fast.kernels.attention.forward import attention, separate, unsupported

__all__ = ["attention", "attention_backward", "separate", "unsupported"]
