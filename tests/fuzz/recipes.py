"""Tensors as recipes: hypothesis draws and shrinks them, and what it prints can be pasted into a test."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("dense", "wide rows", "strided", "permuted", "expanded")
# With one row for all of a weight, all columns of its product are one number: no sample of an error.
OF_WEIGHTS = LAYOUTS[:-1]
# For squares that float32 must hold, and sums of them.
LARGE = torch.finfo(torch.float16).max
NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


@dataclass(frozen=True)
class TensorRecipe:
    """Random values of standard deviation `scale` (of multiples of 1/4 with `coarse`), some of them replaced.

    Of int64, labels below `scale`; of uint8, pixels; of bool, either.
    offset: elements between a 64-byte boundary and the first one. extremes: (which element, its value).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    seed: int = 0
    scale: float = 1.0
    coarse: bool = False
    layout: str = "dense"
    offset: int = 0
    extremes: tuple[tuple[int, float], ...] = ()

    def tensor(self) -> Tensor:
        repeated = self._repeated()
        source = tuple(1 if i == repeated else n for i, n in enumerate(self.shape))
        values = self._values(source, torch.Generator().manual_seed(self.seed))
        for place, value in self.extremes:
            if values.numel():
                values.view(-1)[place % values.numel()] = value
        strides = self._strides()
        extent = 1 + sum((n - 1) * stride for n, stride in zip(self.shape, strides, strict=True))
        memory = torch.zeros(self.offset + max(extent, 0), dtype=self.dtype)
        memory.as_strided(source, strides, self.offset).copy_(values)
        return memory.as_strided(self.shape, strides, self.offset)

    def _values(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.dtype is torch.int64:
            return torch.randint(int(self.scale), shape, generator=generator)
        values = torch.randn(shape, generator=generator)
        if self.dtype is torch.uint8:
            return (128 + 60 * values).clamp(0, 255).to(self.dtype)
        if self.dtype is torch.bool:
            return values > 0
        values *= self.scale
        return ((values * 4).round() / 4 if self.coarse else values).to(self.dtype)

    def _repeated(self) -> int | None:
        """The dimension of stride 0: the first, so that tokens and columns differ."""
        return 0 if self.layout == "expanded" and len(self.shape) > 1 else None

    def _strides(self) -> tuple[int, ...]:
        *leading, width = self.shape
        if self.layout == "wide rows":
            width += 3
        step = 2 if self.layout == "strided" else 1
        order = range(len(leading)) if self.layout == "permuted" else reversed(range(len(leading)))
        strides, stride = {len(leading): step}, width * step
        for i in order:
            strides[i], stride = stride, stride * leading[i] * step
        return tuple(0 if i == self._repeated() else strides[i] for i in range(len(self.shape)))


@st.composite
def recipes(
    draw,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    scale: float = 1.0,
    extremes: tuple[float, ...] = (),
    layouts: tuple[str, ...] = LAYOUTS,
    coarse: bool = False,
) -> TensorRecipe:
    """A tensor whose values are those asked for, or one in eight times of 1/100 of their size or mostly subnormal.

    extremes: what some of its elements may be, besides.
    """
    if dtype.is_floating_point:
        scale = scale * draw(st.sampled_from((1.0,) * 6 + (0.01, 0.0))) or torch.finfo(dtype).tiny
    return TensorRecipe(
        shape,
        dtype,
        seed=draw(st.integers(0, 2**16)),
        scale=scale,
        coarse=coarse,
        layout=draw(st.sampled_from(layouts)),
        offset=draw(st.sampled_from((0, 0, 1, 2, 3, 4, 7))),
        extremes=tuple(draw(_replaced(extremes))) if extremes else (),
    )


def _replaced(extremes: tuple[float, ...]) -> st.SearchStrategy:
    """None in most tensors, so that one does not hide what happens elsewhere."""
    replaced = st.lists(st.tuples(st.integers(0, 2**16), st.sampled_from(extremes)), min_size=1, max_size=3)
    return st.one_of(st.just([]), st.just([]), replaced)
