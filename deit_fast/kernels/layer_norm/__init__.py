"""LayerNorm where it stands alone, and residual add + LayerNorm."""

from deit_fast.kernels.layer_norm.backward import layer_norm_backward
from deit_fast.kernels.layer_norm.forward import add_layer_norm, layer_norm, unsupported

__all__ = ["add_layer_norm", "layer_norm", "layer_norm_backward", "unsupported"]
