"""Attention from the few rows that a model reads."""

from deit_fast.kernels.readout.backward import readout_backward
from deit_fast.kernels.readout.forward import forward_unsupported, readout, unsupported

__all__ = ["forward_unsupported", "readout", "readout_backward", "unsupported"]
