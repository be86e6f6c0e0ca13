"""The operators and the awkward shapes that they are run at."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.kernels import launch
from tests.sanitize.session import CAPABILITIES

EPS = 1e-6
PATCH = 4
HIDDEN = 80
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# The dtype of the products, and whether autocast chose it beside a float32 stream.
PRECISIONS = ((FLOAT32, False), (FLOAT16, False), (BFLOAT16, False), (BFLOAT16, True))
LAYOUTS = ("contiguous", "misaligned", "strided")
# Batch, tokens, width: nothing, one row, tails of every tile, several programs; widths that are no multiple of 16.
SHAPES = (
    (0, 17, 96),
    (1, 1, 64),
    (1, 2, 50),
    (3, 1, 192),
    (1, 17, 192),
    (3, 17, 64),
    (3, 65, 50),
    (1, 65, 96),
    (3, 65, 192),
)
# And the samples that drop path keeps: some, none, all.
KEPT_SHAPES = (
    (1, 17, 64, ()),
    (3, 1, 96, (1,)),
    (3, 17, 192, (0, 2)),
    (3, 65, 50, (2,)),
    (3, 65, 64, (0, 1)),
    (2, 65, 96, (0, 1)),
)
# Heads and their width, by the width of the stream: whole tiles, and 64 + 16 and 64 + 32.
HEADS = {50: (1, 80), 64: (2, 32), 96: (1, 96), 192: (3, 64)}


@dataclass(frozen=True)
class Case:
    op: Callable[["Arguments"], Tensor | tuple[Tensor, ...]]
    dtype: torch.dtype
    autocast: bool
    layout: str
    batch: int
    tokens: int
    width: int
    kept: tuple[int, ...] | None
    capability: int

    def __str__(self) -> str:
        precision = ("autocast-" if self.autocast else "") + str(self.dtype).removeprefix("torch.")
        kept = "" if self.kept is None else f"-kept{''.join(map(str, self.kept)) or 'none'}"
        shape = f"{self.batch}x{self.tokens}x{self.width}"
        return f"{self.op.__name__}-{shape}{kept}-{precision}-{self.layout}-sm_{self.capability}"


class Arguments:
    """Makes an operator's arguments, random but the same each time; in float64 and contiguous where `exact`."""

    def __init__(self, case: Case, exact: bool = False):
        self.case, self.exact = case, exact
        self.batch, self.tokens, self.width = case.batch, case.tokens, case.width
        self.heads, self.head_dim = HEADS[case.width]
        self.dtype = FLOAT32 if case.autocast else case.dtype
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: list[Tensor] = []

    def leaf(self, *shape: int, scale: float = 1.0) -> Tensor:
        """What is differentiated."""
        values = torch.randn(shape, generator=self.generator) * scale
        self.leaves.append(self.data(values.to(self.dtype)).requires_grad_())
        return self.leaves[-1]

    def weight(self, *shape: int) -> Tensor:
        return self.leaf(*shape, scale=shape[-1] ** -0.5)

    def cotangents(self, outputs: list[Tensor]) -> list[Tensor]:
        return [self.data(torch.randn(o.shape, generator=self.generator).to(o.dtype)) for o in outputs]

    def data(self, values: Tensor) -> Tensor:
        if self.exact:
            return values.double() if values.is_floating_point() else values
        return laid_out(values, self.case.layout)

    def factors(self) -> Tensor:
        """Drop path's, a sample each; none is 0 where the case keeps no account of samples."""
        kept = range(self.batch) if self.case.kept is None else self.case.kept
        scale = torch.zeros(self.batch, dtype=self.dtype)
        scale[list(kept)] = 1.25
        return self.data(scale)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """`values` in storage that ends where they end; what lies between and before them is NaN."""
    if layout == "contiguous" or not values.numel():
        return values
    strides, step = [], 1
    for n in reversed(values.shape):
        strides.insert(0, step)
        step = step * n + (layout == "strided")
    offset = int(layout == "misaligned")
    size = offset + 1 + sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True))
    fill = torch.nan if values.is_floating_point() else 1
    storage = torch.full((size,), fill, dtype=values.dtype)
    return storage.as_strided(values.shape, strides, offset).copy_(values)


# Operators ----------------------------------------------------------------------------------------------------------


def layer_norm(t: Arguments):
    x = t.leaf(t.batch, t.tokens, t.width)
    return ops.layer_norm(x, t.leaf(t.width), t.leaf(t.width), EPS)


def add_layer_norm(t: Arguments):
    x, residual = t.leaf(t.batch, t.tokens, t.width), t.leaf(t.batch, t.tokens, t.width)
    return ops.add_layer_norm(x, residual, t.leaf(t.width), t.leaf(t.width), EPS)


def linear(t: Arguments):
    x = t.leaf(t.batch, t.tokens, t.width)
    return ops.linear(x, t.weight(HIDDEN, t.width), t.leaf(HIDDEN), "none", "gelu")


def linear_activated(t: Arguments):
    """The activation in the epilogue, which only inference takes."""
    x = t.leaf(t.batch, t.tokens, t.width)
    with torch.no_grad():
        return ops.linear(x, t.weight(HIDDEN, t.width), t.leaf(HIDDEN), "gelu_tanh")


def layer_norm_linear(t: Arguments):
    x = t.leaf(t.batch, t.tokens, t.width)
    norm = t.leaf(t.width), t.leaf(t.width)
    return ops.layer_norm_linear(x, *norm, EPS, t.weight(HIDDEN, t.width), t.leaf(HIDDEN))


def layer_norm_qkv(t: Arguments):
    x = t.leaf(t.batch, t.tokens, t.width)
    norm = t.leaf(t.width), t.leaf(t.width)
    projections = [make(*shape) for make, shape in 3 * ((t.weight, (HIDDEN, t.width)), (t.leaf, (HIDDEN,)))]
    return ops.layer_norm_qkv(x, *norm, EPS, *projections)


def linear_residual(t: Arguments):
    x, residual = t.leaf(t.batch, t.tokens, HIDDEN), t.leaf(t.batch, t.tokens, t.width)
    parameters = t.weight(t.width, HIDDEN), t.leaf(t.width)
    return ops.linear_residual(x, *parameters, residual, t.leaf(t.width), t.factors(), "gelu_tanh")


def mlp(t: Arguments):
    x = t.leaf(t.batch, t.tokens, t.width)
    norm = t.leaf(t.width), t.leaf(t.width)
    fc1 = t.weight(HIDDEN, t.width), t.leaf(HIDDEN)
    fc2 = t.weight(t.width, HIDDEN), t.leaf(t.width)
    factors = t.factors()
    kept = None if t.case.kept is None else ops.keep_samples(factors)
    return ops.mlp(x, *norm, EPS, *fc1, *fc2, t.leaf(t.width), factors, "gelu", kept)


def attention(t: Arguments):
    qkv = t.leaf(t.batch, t.tokens, 3, t.heads, t.head_dim)
    return ops.attention(qkv, t.head_dim**-0.5)


def attention_qkv(t: Arguments):
    q = t.leaf(t.batch, t.tokens, t.heads, t.head_dim)
    k, v = (t.leaf(t.batch, t.tokens + 16, t.heads, t.head_dim) for _ in range(2))
    return ops.attention_qkv(q, k, v, t.head_dim**-0.5)


def patch_embed(t: Arguments):
    rows = 5 if t.tokens % 5 == 0 else 1
    images = t.leaf(t.batch, 3, rows * PATCH, t.tokens // rows * PATCH)
    projection = t.weight(t.width, 3, PATCH, PATCH), t.leaf(t.width)
    positions = t.leaf(1, 2 + t.tokens, t.width)
    tokens = [t.leaf(1, 1, t.width) for _ in range(3)]
    mask = torch.arange(t.batch * t.tokens).view(t.batch, t.tokens) % 3 == 0
    return ops.patch_embed(images, *projection, positions, *tokens, t.data(mask))


def patch_embed_bytes(t: Arguments):
    """Images of bytes, and positions of the patches alone."""
    images = torch.randint(256, (t.batch, 3, PATCH, t.tokens * PATCH), dtype=torch.uint8, generator=t.generator)
    projection = t.weight(t.width, 3, PATCH, PATCH), t.leaf(t.width)
    positions, cls_token = t.leaf(1, t.tokens, t.width), t.leaf(1, 1, t.width)
    mean, std = t.data(torch.tensor([0.5, 0.4, 0.3])), t.data(torch.tensor([0.2, 0.3, 0.4]))
    return ops.patch_embed(t.data(images), *projection, positions, cls_token, None, None, None, mean, std)


def readout_attention(t: Arguments):
    x, inner = t.leaf(t.batch, t.tokens, t.width), t.heads * t.head_dim
    norm = t.leaf(t.width), t.leaf(t.width)
    projection = t.weight(3 * inner, t.width), t.leaf(3 * inner)
    return ops.readout_attention(x, *norm, EPS, *projection, min(2, t.tokens), t.heads, t.head_dim**-0.5)


def readout_attention_qkv(t: Arguments):
    x, inner = t.leaf(t.batch, t.tokens, t.width), t.heads * t.head_dim
    norm = t.leaf(t.width), t.leaf(t.width)
    projections = [make(*shape) for make, shape in 3 * ((t.weight, (inner, t.width)), (t.leaf, (inner,)))]
    return ops.readout_attention_qkv(x, *norm, EPS, *projections, 1, t.heads, t.head_dim**-0.5)


def hard_distillation(t: Arguments):
    rows = t.batch * t.tokens
    heads = t.leaf(rows, t.width), t.leaf(rows, t.width)
    labels = torch.arange(rows) % t.width
    teacher = t.data(torch.randn(rows, t.width, generator=t.generator))
    return ops.distillation_loss(*heads, t.data(labels), teacher, "hard", 0.5, 1.0, 0.1, ignore_index=3)


def soft_distillation(t: Arguments):
    rows = t.batch * t.tokens
    heads = t.leaf(rows, t.width), t.leaf(rows, t.width)
    targets = t.data(torch.rand(rows, t.width, generator=t.generator))
    teacher = t.data(torch.randn(rows, t.width, generator=t.generator))
    return ops.distillation_loss(*heads, targets, teacher, "soft", 0.5, 3.0)


def keep_samples(t: Arguments):
    factors = torch.rand(t.batch * t.tokens, generator=t.generator)
    return ops.keep_samples(t.data((factors > 0.4) * factors))


def attention_branch(t: Arguments):
    """A block's first half for the kept samples alone: what lies between is packed."""
    x, inner = t.leaf(t.batch, t.tokens, t.width), t.heads * t.head_dim
    norm = t.leaf(t.width), t.leaf(t.width)
    factors = t.factors()
    kept = ops.keep_samples(factors)
    qkv, x = ops.layer_norm_linear_branching(x, *norm, EPS, t.weight(3 * inner, t.width), t.leaf(3 * inner), kept)
    qkv = qkv.view(-1, t.tokens, 3, t.heads, t.head_dim)
    out, _ = ops.attention(qkv, t.head_dim**-0.5, kept)
    projection = t.weight(t.width, inner), t.leaf(t.width)
    return ops.linear_residual(out, *projection, x, t.leaf(t.width), factors, "none", kept)


def mlp_branch(t: Arguments):
    """A block's second half for the kept samples alone, as two operators."""
    x = t.leaf(t.batch, t.tokens, t.width)
    norm = t.leaf(t.width), t.leaf(t.width)
    factors = t.factors()
    kept = ops.keep_samples(factors)
    hidden, x = ops.layer_norm_linear_branching(x, *norm, EPS, t.weight(HIDDEN, t.width), t.leaf(HIDDEN), kept)
    fc2 = t.weight(t.width, HIDDEN), t.leaf(t.width)
    return ops.linear_residual(hidden, *fc2, x, t.leaf(t.width), factors, "gelu", kept)


def _where_none(op: Callable, suffix: str, *functions: str) -> Callable:
    """`op` by the kernels that compute it where these functions of launch.py answer None."""

    def call(t: Arguments):
        with mock.patch.multiple(launch, **dict.fromkeys(functions, lambda *_: None)):
            return op(t)

    call.__name__ = f"{op.__name__}_{suffix}"
    return call


# The vendor's GEMM with the rest in a kernel before or after it; in backward nothing differs.
linear_residual_by_vendor, layer_norm_linear_by_vendor = (
    _where_none(op, "by_vendor", "gemm") for op in (linear_residual, layer_norm_linear)
)
OPERATORS = (
    layer_norm,
    add_layer_norm,
    linear,
    linear_activated,
    layer_norm_linear,
    layer_norm_qkv,
    linear_residual,
    mlp,
    attention,
    attention_qkv,
    patch_embed,
    patch_embed_bytes,
    readout_attention,
    readout_attention_qkv,
    hard_distillation,
    soft_distillation,
    keep_samples,
    linear_residual_by_vendor,
    layer_norm_linear_by_vendor,
)
KEEPING = (attention_branch, mlp_branch, mlp)


def _table(operators: tuple, shapes: list[tuple]) -> list[Case]:
    """Every operator, shape and precision; layout and target by turns, so that each pair of them comes up."""
    rows = product(enumerate(operators), enumerate(shapes), enumerate(PRECISIONS))
    return [
        Case(op, *precision, LAYOUTS[(i + j + k) % 3], *shape, CAPABILITIES[(i + j + k) % 4])
        for (i, op), (j, shape), (k, precision) in rows
    ]


CASES = _table(OPERATORS, [(*shape, None) for shape in SHAPES]) + _table(KEEPING, list(KEPT_SHAPES))
