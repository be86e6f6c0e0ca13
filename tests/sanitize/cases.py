"""The operators and the awkward shapes that they are run at."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.kernels import mlp as mlp_kernels
from deit_fast.kernels.linear import settings
from deit_fast.ops.examples import EPS, Example, Inputs, Size
from deit_fast.ops.operator import OPERATORS, BackwardOperator, Operator
from tests.sanitize.session import CAPABILITIES

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
class SanitizerCase:
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


class Arguments(Inputs):
    """Makes an operator's arguments, random but the same each time; in float64 and contiguous where `exact`."""

    def __init__(self, case: SanitizerCase, exact: bool = False):
        self.case, self.exact = case, exact
        self.batch, self.tokens, self.width = case.batch, case.tokens, case.width
        self.heads, self.head_dim = HEADS[case.width]
        # As many patches as tokens, in rows of several where their number allows it.
        rows = 5 if case.tokens % 5 == 0 else 1
        size = Size(
            case.batch,
            case.tokens,
            case.width,
            self.heads,
            self.head_dim,
            HIDDEN,
            (rows, case.tokens // rows),
            PATCH,
            classes=case.width,
            kept=tuple(range(case.batch)) if case.kept is None else case.kept,
        )
        super().__init__(size, FLOAT32 if case.autocast else case.dtype, torch.device("cpu"))
        self.leaves: list[Tensor] = []

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        """What is differentiated."""
        self.leaves.append(super().normal(*shape, scale=scale, mean=mean).requires_grad_())
        return self.leaves[-1]

    def weight(self, *shape: int) -> Tensor:
        return self.normal(*shape, scale=shape[-1] ** -0.5)

    def cotangents(self, outputs: list[Tensor]) -> list[Tensor]:
        return [self.data(torch.randn(o.shape, generator=self.generator).to(o.dtype)) for o in outputs]

    def data(self, values: Tensor) -> Tensor:
        if self.exact:
            return values.double() if values.is_floating_point() else values
        return laid_out(values, self.case.layout)


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


def _example(op: str, title: str = "") -> Callable:
    """The operator's own example."""
    operator, function = OPERATORS[op], getattr(ops, op)

    def call(t: Arguments):
        for example in operator.examples(t.size, t):
            if example.title == title:
                arguments = [example.arguments[name] for name in inspect.signature(function).parameters]
                t.leaves = [leaf for leaf in t.leaves if not any(leaf is data for data in _data(operator, example))]
                with torch.set_grad_enabled(not example.inference):
                    return function(*arguments)
            t.leaves.clear()
        raise ValueError(f"{op} has no example {title!r}")

    call.__name__ = "_".join((op, *title.replace(",", "").split()))
    return call


def _data(operator: Operator, example: Example) -> list[Tensor]:
    return [example.arguments[name] for name in operator.data]


layer_norm_linear = _example("layer_norm_linear", "QKV")
layer_norm_qkv = _example("layer_norm_linear", "separate q, k, v")
layer_norm_fc1 = _example("layer_norm_fc1")
fc2_residual = _example("fc2_residual")
layer_norm = _example("layer_norm")
_mlp_in_parts = _example("mlp")
attention = _example("attention")
normalise_pixels = _example("normalise_pixels", "erased and mixed")
patch_embed = _example("patch_embed", "masked")
readout_attention = _example("readout_attention")
soft_distillation = _example("distillation_loss", "soft")


def linear(t: Arguments):
    return ops.linear(t.normal(t.batch, t.tokens, t.width), t.weight(HIDDEN, t.width), t.normal(HIDDEN))


def linear_activated(t: Arguments):
    """The activation in the epilogue, which only inference takes."""
    with torch.no_grad():
        return ops.linear(
            t.normal(t.batch, t.tokens, t.width), t.weight(HIDDEN, t.width), t.normal(HIDDEN), "gelu_tanh"
        )


def linear_residual(t: Arguments):
    x, residual = t.normal(t.batch, t.tokens, HIDDEN), t.normal(t.batch, t.tokens, t.width)
    parameters = t.weight(t.width, HIDDEN), t.normal(t.width)
    return ops.linear_residual(x, *parameters, residual, t.normal(t.width), t.drop_path_scale())


def mlp(t: Arguments):
    """In one kernel, on any target."""
    with mock.patch.object(mlp_kernels, "fits", lambda *_: True):
        return _mlp_in_parts(t)


def mlp_of_kept(t: Arguments):
    (example,) = OPERATORS["mlp"].examples(t.size, t)
    kept = ops.keep_samples(example.arguments["drop_path_scale"])
    return ops.mlp(**{**example.arguments, "kept": kept})


def attention_to_more(t: Arguments):
    """Keys and values of more tokens than queries."""
    q = t.normal(t.batch, t.tokens, t.heads, t.head_dim)
    k, v = (t.normal(t.batch, t.tokens + 16, t.heads, t.head_dim) for _ in range(2))
    return ops.attention([q, k, v], t.head_dim**-0.5)


def patch_embed_bytes(t: Arguments):
    """Images of bytes, and positions of the patches alone."""
    images = t.integers(t.batch, 3, PATCH, t.tokens * PATCH, below=256, dtype=torch.uint8)
    projection = t.normal(t.width, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5), t.normal(t.width)
    positions, cls_token = t.normal(1, t.tokens, t.width), t.normal(1, 1, t.width)
    mean, std = t.data(torch.tensor([0.5, 0.4, 0.3])), t.data(torch.tensor([0.2, 0.3, 0.4]))
    return ops.patch_embed(images, *projection, positions, cls_token, None, None, None, mean, std)


def readout_of_a_row(t: Arguments):
    x, inner = t.normal(t.batch, t.tokens, t.width), t.heads * t.head_dim
    norm = t.normal(t.width), t.normal(t.width)
    weights, biases = [t.weight(inner, t.width) for _ in range(3)], [t.normal(inner) for _ in range(3)]
    return ops.readout_attention(x, *norm, EPS, weights, biases, 1, t.heads, t.head_dim**-0.5)


def hard_distillation(t: Arguments):
    rows = t.batch * t.tokens
    heads = t.normal(rows, t.width), t.normal(rows, t.width)
    labels = torch.arange(rows) % t.width
    teacher = t.normal(rows, t.width).detach()
    t.leaves.pop()
    return ops.distillation_loss(*heads, t.data(labels), teacher, "hard", 0.5, 1.0, 0.1, ignore_index=3)


def soft_targets(t: Arguments):
    rows = t.batch * t.tokens
    heads = t.normal(rows, t.width), t.normal(rows, t.width)
    targets = t.data(torch.rand(rows, t.width, generator=t.generator).to(t.dtype))
    teacher = t.normal(rows, t.width).detach()
    t.leaves.pop()
    return ops.distillation_loss(*heads, targets, teacher, "soft", 0.5, 3.0)


def keep_samples(t: Arguments):
    factors = torch.rand(t.batch * t.tokens, generator=t.generator)
    return ops.keep_samples(t.data((factors > 0.4) * factors))


def attention_branch(t: Arguments):
    """A block's first half for the kept samples alone: what lies between is packed."""
    x, inner = t.normal(t.batch, t.tokens, t.width), t.heads * t.head_dim
    norm = t.normal(t.width), t.normal(t.width)
    factors = t.drop_path_scale()
    kept = ops.keep_samples(factors)
    weight, bias = t.weight(3 * inner, t.width), t.normal(3 * inner)
    (qkv,), x = ops.layer_norm_linear_branching(x, *norm, EPS, [weight], [bias], kept)
    qkv = qkv.view(-1, t.tokens, 3, t.heads, t.head_dim)
    out, _ = ops.attention([qkv], t.head_dim**-0.5, kept)
    projection = t.weight(t.width, inner), t.normal(t.width)
    return ops.linear_residual(out, *projection, x, t.normal(t.width), factors, kept)


def mlp_branch(t: Arguments):
    """A block's second half for the kept samples alone, as two operators."""
    x = t.normal(t.batch, t.tokens, t.width)
    norm = t.normal(t.width), t.normal(t.width)
    factors = t.drop_path_scale()
    kept = ops.keep_samples(factors)
    weight, bias = t.weight(HIDDEN, t.width), t.normal(HIDDEN)
    hidden, x = ops.layer_norm_fc1_branching(x, *norm, EPS, weight, bias, "gelu", kept)
    fc2 = t.weight(t.width, HIDDEN), t.normal(t.width)
    return ops.fc2_residual(*hidden, *fc2, x, t.normal(t.width), factors, "gelu", kept)


def _by_vendor(op: Callable) -> Callable:
    """`op` and its backward by the vendor's GEMM, with the rest in a kernel after it."""

    def call(t: Arguments):
        with mock.patch.object(settings, "vendor", lambda *_: True):
            results = op(t)
            outputs = [results] if isinstance(results, Tensor) else list(results)
            found = [output for output in outputs if output.requires_grad]  # FC1's activation is data
            gradients = torch.autograd.grad(found, t.leaves, t.cotangents(found), allow_unused=True)
        return [*(output.detach() for output in outputs), *(each for each in gradients if each is not None)]

    call.__name__ = f"{op.__name__}_by_vendor"
    return call


BY_VENDOR = [
    _by_vendor(op) for op in (linear_residual, layer_norm_linear, layer_norm_qkv, layer_norm_fc1, fc2_residual)
]
linear_residual_by_vendor, *_, fc2_residual_by_vendor = BY_VENDOR


def linear_residual_persistent(t: Arguments):
    """By persistent programs, where a GPU has them and the operands allow it."""
    with mock.patch.object(settings, "persistent", lambda *_: True):
        return linear_residual(t)


_ANY = Size.of_model(32, 1, 8, 4, 8, 1)
CALLED = (
    *(
        _example(name, example.title)
        for name, operator in OPERATORS.items()
        if not isinstance(operator, BackwardOperator) and name != "keep_samples"
        for example in operator.examples(_ANY, Inputs(_ANY, FLOAT32, torch.device("cpu")))
    ),
    linear,
    mlp,
    linear_activated,
    linear_residual,
    attention_to_more,
    patch_embed_bytes,
    readout_of_a_row,
    hard_distillation,
    soft_targets,
    keep_samples,
    *BY_VENDOR,
    linear_residual_persistent,
)
KEEPING = (attention_branch, mlp_branch, mlp_of_kept)


def _table(operators: tuple, shapes: list[tuple]) -> list[SanitizerCase]:
    """Every operator, shape and precision; layout and target by turns, so that each pair of them comes up."""
    rows = product(enumerate(operators), enumerate(shapes), enumerate(PRECISIONS))
    return [
        SanitizerCase(op, *precision, LAYOUTS[(i + j + k) % 3], *shape, CAPABILITIES[(i + j + k) % 4])
        for (i, op), (j, shape), (k, precision) in rows
    ]


CASES = _table(CALLED, [(*shape, None) for shape in SHAPES]) + _table(KEEPING, list(KEPT_SHAPES))
