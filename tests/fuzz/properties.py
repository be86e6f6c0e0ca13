"""Every operator on whatever hypothesis draws, forward and backward, by the rule of `tests/support/accuracy.py`.

What is not drawn, and why:

- Parameters are finite and no larger than a model's: with others, stock overflows in what it rounds to 16 bits between
  two operators, where a fused kernel does not.
- LayerNorm's input stays below 65504, since float32 cannot hold the squares of larger ones, and which sum overflows
  first is no one's promise; attention's queries and keys have scores below some tens (docs/limits.md), and where
  they hold NaN the stock operator is attention as a formula: the fused one answers some rows of NaN with 0.
- Where the true gradient is 0 and what is left is rounding noise, it is not asked for: LayerNorm of one or two columns,
  queries and keys where there is one key.
- Few float32 numbers at the end of long sums are no sample of an error, so outputs have 64 columns where sums of
  float32 cancel, and attention's float32 gradients are asked for where there are a thousand scores.
- Stock's gradient of a scaled branch rounds to float16 what LayerScale makes small, and 0 times an infinite input is
  NaN; ours scales what was summed. So with such inputs float16's gradients of it are not asked for.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, prod

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import reference
from deit_fast import ops
from deit_fast.ops import activations, backend
from deit_fast.ops.operator import OPERATORS
from reference.loss import distillation_loss as exact_loss
from reference.readout import readout_attention as exact_attention_of_rows
from tests.fuzz.recipes import LARGE, NOT_FINITE, OF_WEIGHTS, TensorRecipe, recipes
from tests.support.accuracy import searched
from tests.support.compare import DTYPES, Ways, assert_gradients_are_right, assert_op_is_right, ways_of
from tests.support.guard import Guard

SUBNORMAL = (1e-40, -6e-8)
ANY = (*NOT_FINITE, *SUBNORMAL, LARGE, -LARGE)
EPSILONS = st.sampled_from((1e-6, 1e-5, 1e-12))
ACTIVATIONS = st.sampled_from(("none", "gelu", "gelu_tanh", "gelu_tanh"))
# A second tile of rows begins at 129, a fourth block of queries and keys at 193: few cases, since they take longest.
FEW_TOKENS = st.integers(1, 17)
TOKENS = st.one_of(FEW_TOKENS, FEW_TOKENS, st.sampled_from((63, 64, 65, 130)))
ATTENDED = st.one_of(TOKENS, st.sampled_from((64, 65, 197, 198)))
BATCHES = st.sampled_from((1, 1, 2, 3, 0))
WIDTHS = st.one_of(st.integers(64, 80), st.integers(64, 80), st.sampled_from((64, 96, 128, 192, 200)))
# Of rows that a LayerNorm and a product keep on chip, and of wider ones.
NORMALISED_WIDTHS = st.one_of(WIDTHS, st.integers(193, 208))
DTYPE = st.sampled_from(DTYPES)


@dataclass(frozen=True)
class Kept:
    """Which samples drop path keeps, and for how many there is room among the packed."""

    pattern: tuple[bool, ...]
    capacity: int

    @property
    def samples(self) -> Tensor:
        return torch.tensor([i for i, keep in enumerate(self.pattern) if keep], dtype=torch.long)

    @property
    def factors(self) -> Tensor:
        return torch.tensor(self.pattern, dtype=torch.float32) * 1.25

    def packed(self, gathered: Tensor) -> Tensor:
        """NaN where no kept sample is."""
        room = self.capacity - len(gathered)
        return torch.cat((gathered, gathered.new_full((room, *gathered.shape[1:]), torch.nan)))


@dataclass(frozen=True)
class DrawnCase:
    """Arguments of an operator, tensors as recipes; wrt: which of them are differentiated, all tensors unless given."""

    arguments: tuple
    wrt: tuple[int, ...] | None = None
    kept: Kept | None = None

    def made(self) -> list:
        torch.manual_seed(0)
        return [a.tensor() if isinstance(a, TensorRecipe) else a for a in self.arguments]


PROPERTIES: dict[str, tuple[st.SearchStrategy[DrawnCase], Callable[[DrawnCase], None]]] = {}


def operator(subject: str | Ways | Callable[[Kept], Ways]):
    """Registers a strategy for cases of `subject`, which may depend on the samples that are kept."""

    def register(cases):
        def check(case: DrawnCase) -> None:
            ways = subject if isinstance(subject, str | Ways) else subject(case.kept)
            arguments = case.made()
            # A kernel that fails warns, and the stock operator answers: not what is to be compared.
            with warnings.catch_warnings(action="error", category=UserWarning), searched():
                with torch.no_grad():
                    assert_op_is_right(ways, *arguments)
                if case.wrt != () and subnormal(case.arguments) < 2:
                    assert_gradients_are_right(ways, *arguments, wrt=case.wrt)

        PROPERTIES[cases.__name__] = cases(), check
        return cases

    return register


def subnormal(arguments: tuple) -> int:
    """How many of the tensors are: where two are multiplied, rounding is all that is left of their gradients."""
    tensors = [a for a in arguments if isinstance(a, TensorRecipe) and a.dtype.is_floating_point]
    return sum(tensor.scale <= torch.finfo(tensor.dtype).tiny for tensor in tensors)


def maybe(draw, strategy: st.SearchStrategy):
    return draw(st.one_of(strategy, strategy, st.none()))


def leading(draw, tokens: st.SearchStrategy[int] = TOKENS) -> tuple[int, int]:
    batch = draw(BATCHES)
    return batch, draw(tokens if batch == 1 else FEW_TOKENS)


def norm_parameters(draw, width: int, dtype: torch.dtype) -> tuple:
    return *(maybe(draw, recipes((width,), dtype, layouts=("dense", "strided"))) for _ in range(2)), draw(EPSILONS)


def weight(draw, out_features: int, in_features: int, dtype: torch.dtype) -> TensorRecipe:
    return draw(recipes((out_features, in_features), dtype, in_features**-0.5, SUBNORMAL, OF_WEIGHTS))


def vector(draw, width: int, dtype: torch.dtype):
    return maybe(draw, recipes((width,), dtype, extremes=SUBNORMAL, layouts=("dense", "strided")))


def differentiable(arguments: tuple, *data: int) -> tuple[int, ...]:
    """Positions of the tensors, but for those at `data`."""
    return tuple(i for i, a in enumerate(arguments) if isinstance(a, TensorRecipe) and i not in data)


# Rows -------------------------------------------------------------------------------------------------------------


@operator("layer_norm")
@st.composite
def layer_norm(draw) -> DrawnCase:
    width, dtype = draw(st.one_of(st.integers(1, 9), WIDTHS)), draw(DTYPE)
    x = draw(recipes((*leading(draw), width), dtype, extremes=ANY))
    arguments = (x, *norm_parameters(draw, width, dtype))
    return DrawnCase(arguments, differentiable(arguments, *((0,) if width < 8 else ())))


@operator("add_layer_norm")
@st.composite
def add_layer_norm(draw) -> DrawnCase:
    width, dtype = draw(WIDTHS), draw(DTYPE)
    shape = (*leading(draw), width)
    x, residual = (draw(recipes(shape, dtype, extremes=ANY)) for _ in range(2))
    return DrawnCase((x, residual, *norm_parameters(draw, width, dtype)))


@operator("linear")
@st.composite
def linear(draw) -> DrawnCase:
    into, out, dtype = draw(WIDTHS), draw(WIDTHS), draw(DTYPE)
    x = draw(recipes((*leading(draw), into), dtype, extremes=ANY))
    return DrawnCase((x, weight(draw, out, into, dtype), vector(draw, out, dtype), draw(ACTIVATIONS)))


@operator("layer_norm_linear")
@st.composite
def layer_norm_linear(draw) -> DrawnCase:
    into, out, dtype = draw(NORMALISED_WIDTHS), draw(WIDTHS), draw(DTYPE)
    x = draw(recipes((*leading(draw), into), dtype, extremes=ANY))
    norm = norm_parameters(draw, into, dtype)
    return DrawnCase((x, *norm, weight(draw, out, into, dtype), vector(draw, out, dtype)))


@operator("layer_norm_qkv")
@st.composite
def layer_norm_qkv(draw) -> DrawnCase:
    into, out, dtype = draw(NORMALISED_WIDTHS), draw(WIDTHS), draw(DTYPE)
    x = draw(recipes((*leading(draw), into), dtype, extremes=ANY))
    projections = (each for _ in range(3) for each in (weight(draw, out, into, dtype), vector(draw, out, dtype)))
    return DrawnCase((x, *norm_parameters(draw, into, dtype), *projections))


def drop_path_scale(draw, batch: int, dtype: torch.dtype):
    return maybe(draw, recipes((batch,), dtype, layouts=("dense", "strided")))


@operator("linear_residual")
@st.composite
def linear_residual(draw) -> DrawnCase:
    into, out, dtype = draw(WIDTHS), draw(WIDTHS), draw(DTYPE)
    batch, tokens = leading(draw)
    arguments = (
        draw(recipes((batch, tokens, into), dtype, extremes=ANY)),
        *(weight(draw, out, into, dtype), vector(draw, out, dtype)),
        draw(recipes((batch, tokens, out), dtype, extremes=ANY)),
        *(vector(draw, out, dtype), drop_path_scale(draw, batch, dtype)),
    )
    return DrawnCase(arguments, of_scaled_branch(arguments, 5))


@operator("layer_norm_fc1")
@st.composite
def layer_norm_fc1(draw) -> DrawnCase:
    into, out, dtype = draw(NORMALISED_WIDTHS), draw(WIDTHS), draw(DTYPE)
    x = draw(recipes((*leading(draw), into), dtype, extremes=ANY))
    parameters = (*norm_parameters(draw, into, dtype), weight(draw, out, into, dtype), vector(draw, out, dtype))
    return DrawnCase((x, *parameters, draw(st.sampled_from(("gelu", "gelu_tanh")))))


def _of_pre_activation(function: Callable) -> Callable:
    """`fc2_residual` with what comes out of its activation made of what goes in."""

    def call(pre_activation, *rest):
        return function(pre_activation, activations.apply(rest[-1], pre_activation).detach(), *rest)

    return call


FC2_RESIDUAL = Ways("fc2_residual", *map(_of_pre_activation, ways_of("fc2_residual")[1:]))


@operator(FC2_RESIDUAL)
@st.composite
def fc2_residual(draw) -> DrawnCase:
    into, out, dtype = draw(WIDTHS), draw(WIDTHS), draw(DTYPE)
    batch, tokens = leading(draw)
    arguments = (
        draw(recipes((batch, tokens, into), dtype, extremes=ANY)),
        *(weight(draw, out, into, dtype), vector(draw, out, dtype)),
        draw(recipes((batch, tokens, out), dtype, extremes=ANY)),
        *(vector(draw, out, dtype), drop_path_scale(draw, batch, dtype)),
        draw(st.sampled_from(("gelu", "gelu_tanh"))),
    )
    return DrawnCase(arguments, of_scaled_branch(arguments, 5))


def mlp_arguments(draw, batch: int, tokens: int, dtype: torch.dtype) -> tuple:
    width, hidden = draw(WIDTHS), draw(WIDTHS)
    return (
        draw(recipes((batch, tokens, width), dtype, extremes=ANY)),
        *norm_parameters(draw, width, dtype),
        *(weight(draw, hidden, width, dtype), vector(draw, hidden, dtype)),
        *(weight(draw, width, hidden, dtype), vector(draw, width, dtype)),
        vector(draw, width, dtype),
    )


@operator("mlp")
@st.composite
def mlp(draw) -> DrawnCase:
    (batch, tokens), dtype = leading(draw), draw(DTYPE)
    arguments = (
        *mlp_arguments(draw, batch, tokens, dtype),
        drop_path_scale(draw, batch, dtype),
        draw(st.sampled_from(("gelu", "gelu_tanh"))),
    )
    return DrawnCase(arguments, of_scaled_branch(arguments, 9))


def of_scaled_branch(arguments: tuple, drop_path_scale: int) -> tuple[int, ...]:
    x = arguments[0]
    infinite = x.dtype is torch.float16 and any(not isfinite(value) for _, value in x.extremes)
    return () if infinite else differentiable(arguments, drop_path_scale)


# Attention --------------------------------------------------------------------------------------------------------


def enough_weights(weights: int, dtype: torch.dtype) -> bool:
    """Whether the softmax has enough of them that their rounding, all there is to a float32 gradient, is a sample."""
    return weights >= 1024 or dtype is not torch.float32


@operator("attention")
@st.composite
def attention(draw) -> DrawnCase:
    (batch, tokens), dtype = leading(draw, ATTENDED), draw(DTYPE)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from((32, 64, 80, 96, 128)))
    # Few log-sum-exps are no sample: there the scores are exact.
    coarse = batch * heads * tokens < 64
    qkv = draw(recipes((batch, tokens, 3, heads, head_dim), dtype, coarse=coarse))
    sampled = tokens > 1 and enough_weights(batch * heads * tokens * tokens, dtype)
    return DrawnCase((qkv, draw(st.sampled_from((0.125, head_dim**-0.5)))), (0,) if sampled else ())


@operator("attention_qkv")
@st.composite
def attention_qkv(draw) -> DrawnCase:
    (batch, queries), keys, dtype = leading(draw, ATTENDED), draw(ATTENDED), draw(DTYPE)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from((32, 64, 80, 96, 128)))
    coarse = batch * heads * queries < 64
    q = draw(recipes((batch, queries, heads, head_dim), dtype, coarse=coarse))
    k = draw(recipes((batch, keys, heads, head_dim), dtype, coarse=coarse))
    # A large one would be all of its column's output, and that all of the norm.
    v = draw(recipes((batch, keys, heads, head_dim), dtype, extremes=(*NOT_FINITE, *SUBNORMAL)))
    scale = draw(st.sampled_from((0.125, head_dim**-0.5)))
    if not enough_weights(batch * heads * queries * keys, dtype):
        return DrawnCase((q, k, v, scale), ())
    return DrawnCase((q, k, v, scale), (0, 1, 2) if keys > 1 else (2,))


def attention_formula(qkv: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return ((q @ k.mT * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)


# Not the log-sum-exp: of an infinite score it is infinity or NaN, as the formula is written.
NOT_FINITE_ATTENTION = Ways(
    "attention",
    lambda qkv, scale: ops.attention([qkv], scale)[0],
    attention_formula,
    lambda *given: reference.attention(*given)[0],
)


@operator(NOT_FINITE_ATTENTION)
@st.composite
def not_finite_attention(draw) -> DrawnCase:
    (batch, tokens), dtype = leading(draw, ATTENDED), draw(DTYPE)
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from((32, 64)))
    qkv = draw(recipes((batch, tokens, 3, heads, head_dim), dtype, extremes=NOT_FINITE, coarse=True))
    return DrawnCase((qkv, 0.125), ())


def projected(draw, x: TensorRecipe, heads: int, width: int, dtype: torch.dtype) -> tuple:
    """Arguments from x on of an operator that projects to q, k and v itself, without the heads and the scale."""
    into = x.shape[-1]
    projections = [
        draw(recipes(shape, dtype, into ** (0.5 - len(shape) / 2), layouts=OF_WEIGHTS))
        for _ in range(3)
        for shape in ((width, into), (width,))
    ]
    return (x, *norm_parameters(draw, into, dtype), *projections)


def stock_readout(x, norm_weight, norm_bias, eps, q, q_bias, k, k_bias, v, v_bias, rows, heads, scale):
    """What a model's own modules compute."""
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    q, k, v = (
        F.linear(normalised, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    )
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)[:, :rows], x[:, :rows]


def exact_readout(x, norm_weight, norm_bias, eps, q, q_bias, k, k_bias, v, v_bias, rows, heads, scale):
    out = exact_attention_of_rows(
        x, norm_weight, norm_bias, eps, q, q_bias, k, v, v_bias, heads, scale, readout_rows=rows
    )
    return out, x[:, :rows]


def readout(x, norm_weight, norm_bias, eps, *rest):
    *projections, rows, heads, scale = rest
    weights, biases = projections[::2], projections[1::2]
    return ops.readout_attention(x, norm_weight, norm_bias, eps, weights, biases, rows, heads, scale)


READOUT = Ways("readout_attention", readout, stock_readout, exact_readout)


@operator(READOUT)
@st.composite
def readout_attention_qkv(draw) -> DrawnCase:
    (batch, tokens), dtype = leading(draw, ATTENDED), draw(DTYPE)
    heads = draw(st.sampled_from((1, 2, 3)))
    width = heads * draw(st.sampled_from((32, 64)))
    rows = draw(st.integers(1, min(2, tokens)))
    x = draw(recipes((batch, tokens, width), dtype, extremes=NOT_FINITE))
    arguments = (*projected(draw, x, heads, width, dtype), rows, heads, (width // heads) ** -0.5)
    # The values' bias has the gradient of Σ p = 1, also where p is NaN.
    return DrawnCase(arguments, differentiable(arguments, 7) if tokens > 1 and not x.extremes else ())


# Images -----------------------------------------------------------------------------------------------------------


@operator("patch_embed")
@st.composite
def patch_embed(draw) -> DrawnCase:
    batch, dtype, width = draw(BATCHES), draw(DTYPE), draw(WIDTHS)
    channels, patch = draw(st.integers(1, 4)), (draw(st.integers(1, 16)), draw(st.integers(1, 16)))
    grid = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    patches, depth = grid[0] * grid[1], channels * patch[0] * patch[1]
    image = (batch, channels, grid[0] * patch[0], grid[1] * patch[1])
    prefix = [maybe(draw, recipes((1, 1, width), dtype)) for _ in range(2)]
    rows = patches + draw(st.sampled_from((0, sum(t is not None for t in prefix))))
    masked, pixels = draw(st.booleans()), draw(st.booleans())
    arguments = (
        draw(recipes(image, torch.uint8) if pixels else recipes(image, dtype, extremes=ANY)),
        draw(recipes((width, channels, *patch), dtype, depth**-0.5, layouts=OF_WEIGHTS)),
        vector(draw, width, dtype),
        maybe(draw, recipes((1, rows, width), dtype)),
        *prefix,
        draw(recipes((1, 1, width), dtype)) if masked else None,
        draw(recipes((batch, patches), torch.bool)) if masked else None,
        *(
            (TensorRecipe((channels,), torch.float32), TensorRecipe((channels,), torch.float32, 1))
            if pixels
            else (None, None)
        ),
    )
    return DrawnCase(arguments, differentiable(arguments, *((0,) if pixels else ()), 7, 8, 9))


@operator("normalise_pixels")
@st.composite
def normalise_pixels(draw) -> DrawnCase:
    batch, channels, height, width = (draw(BATCHES), *(draw(st.integers(1, most)) for most in (4, 70, 70)))

    def rectangle() -> tuple[int, int, int, int]:
        top, left = draw(st.integers(0, height)), draw(st.integers(0, width))
        return top, left, draw(st.integers(0, height - top)), draw(st.integers(0, width - left))

    def rectangles(count: int, *rest: int) -> Tensor:
        found = [[(*rectangle(), *rest) for _ in range(count)] for _ in range(batch)]
        return torch.tensor(found, dtype=torch.int32).view(batch, count, 4 + len(rest))

    erased = draw(st.booleans())
    noise = recipes((channels * height * width,), torch.float32, extremes=NOT_FINITE)
    arguments = (
        draw(recipes((batch, channels, height, width), torch.uint8)),
        *(TensorRecipe((channels,), torch.float32), TensorRecipe((channels,), torch.float32, 1)),
        draw(DTYPE),
        rectangles(1, 0) if erased else None,
        draw(noise) if erased else None,
        maybe(draw, recipes((batch, 2), torch.float32)),
        rectangles(1)[:, 0] if draw(st.booleans()) else None,
    )
    return DrawnCase(arguments, ())


# Samples that drop path keeps -------------------------------------------------------------------------------------


@st.composite
def kept_samples(draw) -> Kept:
    """None, one, all, or any of up to five."""
    batch = draw(st.integers(1, 5))
    one = draw(st.integers(0, batch - 1))
    some = st.tuples(*[st.booleans()] * batch)
    pattern = draw(st.one_of(st.just((False,) * batch), st.just((True,) * batch), some, some))
    pattern = draw(st.sampled_from((pattern, tuple(i == one for i in range(batch)))))
    return Kept(pattern, draw(st.integers(sum(pattern), batch)))


def dropped_is_nan(draw, kept: Kept, shape: tuple[int, ...], dtype: torch.dtype) -> TensorRecipe:
    """A whole batch whose dropped samples hold NaN."""
    size = prod(shape[1:])
    dropped = tuple((i * size, torch.nan) for i, keep in enumerate(kept.pattern) if not keep)
    x = draw(recipes(shape, dtype, layouts=OF_WEIGHTS))
    return replace(x, extremes=dropped)


def layer_norm_linear_of(kept: Kept) -> Ways:
    def ours(*arguments):
        *rest, weight, bias = arguments
        kept_samples = ops.keep_samples(kept.factors)
        (found,) = ops.layer_norm_linear(*rest, [weight], [bias], kept_samples, kept.capacity)
        return found[: len(kept.samples)]

    def alone(function):
        return lambda x, *rest: function(x[kept.samples], *rest)

    def stock(*arguments):
        *rest, weight, bias = arguments
        return OPERATORS["layer_norm_linear"].stock(*rest, [weight], [bias], None, None, "none")[0]

    return Ways("layer_norm_linear", ours, alone(stock), alone(reference.layer_norm_linear))


@operator(layer_norm_linear_of)
@st.composite
def kept_layer_norm_linear(draw) -> DrawnCase:
    kept, into, out, dtype = draw(kept_samples()), draw(WIDTHS), draw(WIDTHS), draw(DTYPE)
    x = dropped_is_nan(draw, kept, (len(kept.pattern), draw(FEW_TOKENS), into), dtype)
    norm = norm_parameters(draw, into, dtype)
    return DrawnCase((x, *norm, weight(draw, out, into, dtype), vector(draw, out, dtype)), kept=kept)


def linear_residual_of(kept: Kept) -> Ways:
    def ours(x, weight, bias, residual, layer_scale):
        factors = kept.factors.to(residual.dtype)
        return ops.linear_residual(
            kept.packed(x), weight, bias, residual, layer_scale, factors, ops.keep_samples(factors)
        )

    def alone(function):
        def branch(x, weight, bias, residual, layer_scale):
            factors = kept.factors.to(residual.dtype)[kept.samples]
            rows = function(x, weight, bias, residual[kept.samples], layer_scale, factors)
            return residual.index_copy(0, kept.samples, rows)

        return branch

    stock = alone(lambda *arguments: OPERATORS["linear_residual"].stock(*arguments, None))
    return Ways("linear_residual", ours, stock, alone(reference.linear_residual))


@operator(linear_residual_of)
@st.composite
def kept_linear_residual(draw) -> DrawnCase:
    kept, into, out, dtype = draw(kept_samples()), draw(WIDTHS), draw(WIDTHS), draw(DTYPE)
    tokens = draw(FEW_TOKENS)
    arguments = (
        draw(recipes((sum(kept.pattern), tokens, into), dtype)),
        *(weight(draw, out, into, dtype), vector(draw, out, dtype)),
        dropped_is_nan(draw, kept, (len(kept.pattern), tokens, out), dtype),
        vector(draw, out, dtype),
    )
    return DrawnCase(arguments, kept=kept)


def attention_of(kept: Kept) -> Ways:
    def ours(qkv, scale):
        found = ops.attention([kept.packed(qkv)], scale, ops.keep_samples(kept.factors))
        return tuple(each[: len(kept.samples)] for each in found)

    def stock(qkv, scale):
        return OPERATORS["attention"].stock([qkv], scale, None)

    return Ways("attention", ours, stock, reference.attention)


@operator(attention_of)
@st.composite
def kept_attention(draw) -> DrawnCase:
    kept, tokens, dtype = draw(kept_samples()), 1 + draw(FEW_TOKENS), draw(DTYPE)
    heads, head_dim = draw(st.integers(1, 2)), draw(st.sampled_from((32, 64, 80)))
    samples = sum(kept.pattern)
    coarse = samples * heads * tokens < 64
    qkv = draw(recipes((samples, tokens, 3, heads, head_dim), dtype, coarse=coarse))
    sampled = enough_weights(samples * heads * tokens * tokens, dtype)
    return DrawnCase((qkv, head_dim**-0.5), (0,) if sampled else (), kept)


def mlp_of(kept: Kept) -> Ways:
    def ours(x, *parameters_and_activation):
        *parameters, activation = parameters_and_activation
        factors = kept.factors.to(x.dtype)
        return ops.mlp(x, *parameters, factors, activation, ops.keep_samples(factors))

    def alone(function):
        def branch(x, *parameters_and_activation):
            *parameters, activation = parameters_and_activation
            rows = function(x[kept.samples], *parameters, kept.factors.to(x.dtype)[kept.samples], activation)
            return x.index_copy(0, kept.samples, rows)

        return branch

    stock = alone(lambda *arguments: OPERATORS["mlp"].stock(*arguments, None))
    return Ways("mlp", ours, stock, alone(reference.mlp))


@operator(mlp_of)
@st.composite
def kept_mlp(draw) -> DrawnCase:
    kept, dtype = draw(kept_samples()), draw(DTYPE)
    batch, tokens = len(kept.pattern), draw(FEW_TOKENS)
    _, *parameters = mlp_arguments(draw, 1, 1, dtype)
    x = dropped_is_nan(draw, kept, (batch, tokens, parameters[3].shape[1]), dtype)
    return DrawnCase((x, *parameters, draw(st.sampled_from(("gelu", "gelu_tanh")))), kept=kept)


@st.composite
def keep_samples(draw) -> TensorRecipe:
    """Factors of which half are 0."""
    batch, dtype = draw(st.one_of(st.integers(0, 40), st.sampled_from((1023, 1024, 1025)))), draw(DTYPE)
    zeros = draw(st.lists(st.integers(0, 2**16), max_size=batch))
    factors = draw(recipes((batch,), dtype, extremes=ANY, layouts=("dense", "strided")))
    return replace(factors, extremes=(*factors.extremes, *((place, 0.0) for place in zeros)))


def keep_samples_is_right(factors: TensorRecipe) -> None:
    given, guard = factors.tensor(), Guard()
    with backend.forced("triton"), guard.outputs():
        kept = ops.keep_samples(guard(given))
    guard.assert_untouched()
    is_kept = given != 0
    expected = torch.cat((is_kept.sum()[None], is_kept.nonzero()[:, 0], (~is_kept).nonzero()[:, 0]))
    assert torch.equal(kept, expected.int())


PROPERTIES["keep_samples"] = keep_samples(), keep_samples_is_right


# Loss -------------------------------------------------------------------------------------------------------------


def stock_loss(logits, dist_logits, targets, teacher, kind, alpha, tau, label_smoothing, ignore_index):
    """The original repository's formula."""
    ignored = -100 if ignore_index is None else ignore_index
    base = F.cross_entropy(logits, targets, ignore_index=ignored, label_smoothing=label_smoothing)
    if kind == "hard":
        distillation = F.cross_entropy(dist_logits, teacher.argmax(dim=1))
    else:
        student, teacher = F.log_softmax(dist_logits / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / dist_logits.numel()
    return base * (1 - alpha) + distillation * alpha


LOSS = Ways("distillation_loss", ops.distillation_loss, stock_loss, exact_loss)


@operator(LOSS)
@st.composite
def distillation_loss(draw) -> DrawnCase:
    batch, dtype = draw(st.integers(1, 6)), draw(DTYPE)
    classes = draw(st.one_of(st.integers(10, 40), st.sampled_from((1000, 2048, 2049))))
    if dtype is torch.float16:
        # Of more logits the soft loss's sum, before stock divides it, passes 65504.
        batch = min(batch, max(1, 4096 // classes))
    logits, dist_logits, teacher = (draw(recipes((batch, classes), dtype, scale)) for scale in (1.0, 3.0, 3.0))
    labels = draw(recipes((batch,), torch.int64, classes, layouts=("dense", "strided")))
    options = (
        draw(st.sampled_from(("soft", "hard"))),
        draw(st.sampled_from((0.0, 0.3, 1.0))),
        draw(st.sampled_from((1.0, 3.0))),
        draw(st.sampled_from((0.0, 0.1))),
        draw(st.one_of(st.none(), st.integers(0, classes - 1))),
    )
    # A float32 row's gradient has the rounding of its one log-sum-exp: few rows are no sample.
    sampled = batch >= 4 or dtype is not torch.float32
    return DrawnCase((logits, dist_logits, labels, teacher, *options), (0, 1) if sampled else ())
