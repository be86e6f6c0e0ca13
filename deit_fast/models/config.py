"""What tells one DeiT from another."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DeiTConfig:
    """A DeiT's hyper-parameters.

    Raises:
        ValueError: the image is no whole number of patches, the heads don't divide the width, or a count is
            not positive (`num_classes` may be 0: no head, the model returns features).
    """

    embed_dim: int
    depth: int
    num_heads: int
    img_size: int | tuple[int, int] = 224
    """Pixels along the side of a square image, or (height, width)."""
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 1000
    mlp_ratio: float = 4.0
    distilled: bool = False
    """A distillation token and a second head on it (DeiT, section 4)."""
    init_values: float | None = None
    """What LayerScale starts from; None: no LayerScale."""
    no_embed_class: bool = False
    """Position embeddings for the patches alone, as in DeiT III."""
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in ("embed_dim", "depth", "num_heads", "patch_size", "in_chans"):
            if not _is_count(getattr(self, field), least=1):
                raise ValueError(f"{field} must be a positive integer, got {getattr(self, field)!r}")
        if not _is_count(self.num_classes, least=0):
            raise ValueError(f"num_classes must be an integer and at least 0, got {self.num_classes!r}")
        object.__setattr__(self, "img_size", _image_size(self.img_size, self.patch_size))
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {self.embed_dim} and {self.num_heads}")

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        height, width = self.img_size if isinstance(self.img_size, tuple) else (self.img_size, self.img_size)
        return self.in_chans, height, width

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across the image."""
        _, height, width = self.input_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of the image."""
        rows, columns = self.grid_size
        return rows * columns

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: class, and distillation."""
        return 2 if self.distilled else 1

    @property
    def num_prefix_positions(self) -> int:
        """Rows of the position embedding before those of the patches."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def num_positions(self) -> int:
        """Rows of the position embedding."""
        return self.num_prefix_positions + self.num_patches


def _image_size(img_size: Any, patch_size: int) -> int | tuple[int, int]:
    """An int for a square, however it was given; JSON has lists for tuples."""
    sides = img_size if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(sides) != 2 or not all(_is_count(side, least=1) for side in sides):
        raise ValueError(f"img_size must be a positive integer, or two of them (height, width), got {img_size!r}")
    for side in sides:
        if side % patch_size:
            below = side - side % patch_size
            raise ValueError(
                f"img_size must be a multiple of the patch size {patch_size}, got {side}; "
                f"the nearest are {' and '.join(str(s) for s in (below, below + patch_size) if s)}"
            )
    height, width = sides
    return height if height == width else (height, width)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
