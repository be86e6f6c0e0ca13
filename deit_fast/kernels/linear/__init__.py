"""Linear layers, with the operations before and after them fused in."""

from deit_fast.kernels.linear.backward import layer_norm_linear_backward, linear_backward
from deit_fast.kernels.linear.forward import layer_norm_fc1, layer_norm_linear, linear, linear_residual

__all__ = [
    "layer_norm_fc1",
    "layer_norm_linear",
    "layer_norm_linear_backward",
    "linear",
    "linear_backward",
    "linear_residual",
]
