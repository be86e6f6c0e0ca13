"""Examples of operators' arguments at the sizes of a model, random but the same each time."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS = 1e-6
PREFIX = 2  # CLS and distillation token


@dataclass(frozen=True)
class Size:
    """Of a model and of its batch.

    grid: rows and columns of patches. kept: the samples that drop path keeps, by default three of every four.
    """

    batch: int
    tokens: int
    width: int
    heads: int
    head_dim: int
    hidden: int
    grid: tuple[int, int]
    patch: int
    classes: int
    kept: tuple[int, ...] | None = None

    @classmethod
    def of_model(cls, width: int, heads: int, image: int, patch: int, classes: int, batch: int) -> "Size":
        """Square images, and an MLP four times as wide."""
        side = image // patch
        return cls(batch, PREFIX + side**2, width, heads, width // heads, 4 * width, (side, side), patch, classes)

    @property
    def scale(self) -> float:
        """Of attention's scores."""
        return self.head_dim**-0.5

    @property
    def attended(self) -> int:
        """The width of q, of k and of v."""
        return self.heads * self.head_dim

    @property
    def readout_rows(self) -> int:
        return min(PREFIX, self.tokens)


@dataclass(frozen=True)
class Example:
    """All arguments of an operator, by name. inference: it is called so without gradients alone."""

    title: str
    arguments: dict[str, Any] = field(repr=False)
    inference: bool = False


class Inputs:
    """Random tensors of one size, dtype and device, from a seed."""

    def __init__(self, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = size, dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator)
        return self.data((mean + scale * values).to(self.dtype))

    def integers(self, *shape: int, below: int, dtype: torch.dtype) -> Tensor:
        return self.data(torch.randint(below, shape, generator=self.generator).to(dtype))

    def data(self, values: Tensor) -> Tensor:
        """`values` as an operator gets them."""
        return values.to(self.device)

    def sequence(self) -> Tensor:
        """Of tokens, [B, N, D]."""
        return self.normal(self.size.batch, self.size.tokens, self.size.width)

    def norm(self, prefix: str = "norm_") -> dict[str, Any]:
        width = self.size.width
        return {
            f"{prefix}weight": self.normal(width, scale=0.1, mean=1.0),
            f"{prefix}bias": self.normal(width, scale=0.1),
            "eps": EPS,
        }

    def linear(self, outputs: int, inputs: int, prefix: str = "") -> dict[str, Tensor]:
        return {
            f"{prefix}weight": self.normal(outputs, inputs, scale=inputs**-0.5),
            f"{prefix}bias": self.normal(outputs, scale=0.1),
        }

    def projections(self, *widths: int) -> dict[str, list[Tensor]]:
        """Of the tokens, to each of these widths."""
        found = [self.linear(width, self.size.width) for width in widths]
        return {"weights": [each["weight"] for each in found], "biases": [each["bias"] for each in found]}

    def drop_path_scale(self) -> Tensor:
        """One factor a sample, 0 for the dropped ones."""
        factors = torch.zeros(self.size.batch)
        kept = self.size.kept
        factors[[i for i in range(self.size.batch) if (i % 4 if kept is None else i in kept)]] = 1.25
        return self.data(factors.to(self.dtype))

    def branch_scales(self) -> dict[str, Tensor]:
        """LayerScale and drop path."""
        return {
            "layer_scale": self.normal(self.size.width, scale=0.1, mean=1.0),
            "drop_path_scale": self.drop_path_scale(),
        }
