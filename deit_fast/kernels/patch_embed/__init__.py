"""The patch embedding."""

from deit_fast.kernels.patch_embed.backward import patch_embed_backward
from deit_fast.kernels.patch_embed.forward import patch_embed

__all__ = ["patch_embed", "patch_embed_backward"]
