"""A pre-norm transformer block: the operators that its two halves call, and all of them as one chain.

A chain costs the host one call for inference, and one node of autograd's graph for training. Where it can't be used the
operators are called one by one; either way they are the same, and so are the numbers.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deit_fast.ops import backend
from deit_fast.ops.attention import attend, by_head, softmax_attention
from deit_fast.ops.chain import Chain, undisturbed
from deit_fast.ops.feed_forward import (
    fc2_residual,
    layer_norm_fc1_branching,
    normalised_fc1,
    residual_fc2,
)
from deit_fast.ops.layer_norm_linear import layer_norm_linear, layer_norm_linear_branching, normalised_linear
from deit_fast.ops.linear import linear_residual, residual_linear
from deit_fast.ops.mlp import mlp, mlp_fits
from deit_fast.ops.operator import batches_gradients, cast_argument, derivatives
from deit_fast.ops.product_dtype import as_dtype
from deit_fast.ops.readout import readout_attention


class AttentionHalf(NamedTuple):
    """LayerNorm, q, k and v of one packed projection or three, attention, the output projection, and its residual.

    norm_weight, norm_bias [D]; each of weights [N, D] and biases [N]; out_weight [D, H·d]; layer_scale [D].
    drop_path_scale [B], kept, capacity: a draw of drop path (`ops.keep_samples`). readout_rows: R > 0 for the first R
    rows alone, for all samples, whichever are kept (`ops.readout_attention`).
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    weights: list[Tensor]
    biases: list[Tensor | None]
    heads: int
    softmax_scale: float
    out_weight: Tensor
    out_bias: Tensor | None
    layer_scale: Tensor | None
    drop_path_scale: Tensor | None
    kept: Tensor | None
    capacity: int | None
    readout_rows: int


class MlpHalf(NamedTuple):
    """LayerNorm, FC1, activation, FC2 and its residual.

    fc1_weight [hidden, D], fc2_weight [D, hidden]; the rest as of `AttentionHalf`. memory: "low" keeps nothing of what
    goes into the activation, and backward computes it again.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    activation: str
    layer_scale: Tensor | None
    drop_path_scale: Tensor | None
    kept: Tensor | None
    capacity: int | None
    memory: str


def transformer_block(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    """x [B, N, D] → [B, N, D], or the first rows of it."""
    if not _is_chain(x, attention, mlp):
        return _one_by_one(x, attention, mlp)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        # All that the operators would cast: what they hand on has this dtype then.
        dtype = torch.get_autocast_dtype(x.device.type)
        attention = attention._replace(
            weights=cast_argument(attention.weights, dtype), out_weight=cast_argument(attention.out_weight, dtype)
        )
        mlp = mlp._replace(
            fc1_weight=cast_argument(mlp.fc1_weight, dtype), fc2_weight=cast_argument(mlp.fc2_weight, dtype)
        )
    return _chained(x, attention, mlp)


def attention_half(x: Tensor, a: AttentionHalf) -> Tensor:
    """x [B, N, D] → [B, N, D] in three operators."""
    parameters = a.norm_weight, a.norm_bias, a.eps, a.weights, a.biases
    if a.readout_rows:
        out, x = readout_attention(x, *parameters, a.readout_rows, a.heads, a.softmax_scale)
    else:
        projected, x = layer_norm_linear_branching(x, *parameters, a.kept, a.capacity)
        out = attend(projected, a.heads, a.softmax_scale, a.kept)
    return linear_residual(out, a.out_weight, a.out_bias, x, a.layer_scale, a.drop_path_scale, a.kept)


def mlp_half(x: Tensor, m: MlpHalf) -> Tensor:
    """x [B, N, D] → [B, N, D] in two operators.

    In one without gradients where that is faster (`mlp_fits`), and with them where nothing is kept.
    """
    norm = m.norm_weight, m.norm_bias, m.eps
    fc1, fc2 = (m.fc1_weight, m.fc1_bias), (m.fc2_weight, m.fc2_bias)
    training = torch.is_grad_enabled()
    if m.memory == "low" if training else mlp_fits(x):
        return mlp(x, *norm, *fc1, *fc2, m.layer_scale, m.drop_path_scale, m.activation, m.kept)
    if training:
        (hidden, activated), x = layer_norm_fc1_branching(x, *norm, *fc1, m.activation, m.kept, m.capacity)
        return fc2_residual(hidden, activated, *fc2, x, m.layer_scale, m.drop_path_scale, m.activation, m.kept)
    (activated,) = layer_norm_linear(x, *norm, [m.fc1_weight], [m.fc1_bias], m.kept, m.capacity, m.activation)
    return linear_residual(activated, *fc2, x, m.layer_scale, m.drop_path_scale, m.kept)


def _one_by_one(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    return mlp_half(attention_half(x, attention), mlp)


# As a chain ---------------------------------------------------------------------------------------------------------


def _is_chain(x: Tensor, a: AttentionHalf, m: MlpHalf) -> bool:
    """Whether the kernels compute this block, nobody wants to see its operators, and its shapes come again."""
    if not backend.use_triton(x) or a.readout_rows or m.memory == "low":
        return False
    # Room for fewer samples than there are is another shape at every step.
    if any(half.kept is not None and half.capacity != x.shape[0] for half in (a, m)):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return undisturbed()
    # The operators refuse any mixture that stock does.
    tensors = (*a.weights, a.out_weight, a.layer_scale, m.fc1_weight, m.fc2_weight, m.layer_scale)
    for tensor in tensors:
        if tensor is not None and tensor.dtype is not x.dtype:
            return False
    return undisturbed()


def _chained(x: Tensor, attention: AttentionHalf, mlp: MlpHalf) -> Tensor:
    flat = _flat(x, attention, mlp)
    if torch.is_grad_enabled():
        for argument in flat:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return _apply(len(attention.weights), *flat)
        with torch.no_grad():
            return _inference.run(flat, x, attention, mlp)
    return _inference.run(flat, x, attention, mlp)


def _flat(x: Tensor, a: AttentionHalf, m: MlpHalf) -> tuple:
    return (x, *a[:3], *a.weights, *a.biases, *a[5:], *m)


def _gathered(projections: int, flat: Sequence[Any]) -> tuple[Tensor, AttentionHalf, MlpHalf]:
    """What `_flat` has laid out."""
    weights, biases, rest = 4, 4 + projections, 4 + 2 * projections
    attention = (*flat[1:4], list(flat[weights:biases]), list(flat[biases:rest]), *flat[rest : rest + 9])
    return flat[0], AttentionHalf._make(attention), MlpHalf._make(flat[rest + 9 :])


def _forward(x: Tensor, a: AttentionHalf, m: MlpHalf) -> tuple[Tensor, ...]:
    """The block's result, and what `_backward` reads."""
    projected = normalised_linear(x, *a[:5], a.kept, a.capacity, "none")
    out, log_sum_exp = softmax_attention(by_head(projected, a.heads), a.softmax_scale, a.kept)
    x = residual_linear(out, a.out_weight, a.out_bias, x, a.layer_scale, a.drop_path_scale, a.kept)
    pre_activation, activated = normalised_fc1(x, *m[:5], m.activation, m.kept, m.capacity)
    y = residual_fc2(
        pre_activation, activated, m.fc2_weight, m.fc2_bias, x, m.layer_scale, m.drop_path_scale, m.activation, m.kept
    )
    return y, *projected, out, log_sum_exp, x, pre_activation


def _backward(
    grad: Tensor, x: Tensor, a: AttentionHalf, m: MlpHalf, kept: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """A gradient or None for each of `needs`, which are those of what `_flat` gives. kept: by `_forward`."""
    *projected, out, log_sum_exp, x1, pre_activation = kept
    # Flags, in the places of what they are about.
    flags: Any = _gathered(len(a.weights), needs)
    need_x, of, of_mlp = flags
    need_norm = need_x, of.norm_weight, of.norm_bias, *of.weights, *of.biases
    need_out = any(need_norm)
    need_x1 = need_out or of.out_weight or of.out_bias or of.layer_scale
    need_fc1 = need_x1, of_mlp.norm_weight, of_mlp.norm_bias, of_mlp.fc1_weight, of_mlp.fc1_bias
    found_norm: Sequence[Tensor | None] = [None] * len(need_norm)
    found_fc1: Sequence[Tensor | None] = [None] * 5
    found_out: Sequence[Tensor | None] = [None] * 5

    fc2 = residual_fc2.Arguments(
        pre_activation, None, m.fc2_weight, m.fc2_bias, None, m.layer_scale, m.drop_path_scale, m.activation, m.kept
    )
    need_fc2 = any(need_fc1), of_mlp.fc2_weight, of_mlp.fc2_bias, need_x1, of_mlp.layer_scale
    found_fc2 = residual_fc2.backward(fc2, (), (grad,), need_fc2)
    if any(need_fc1):
        fc1 = normalised_fc1.Arguments(x1, *m[:5], m.activation, m.kept, None)
        found_fc1 = normalised_fc1.backward(fc1, (), (found_fc2[0], None, _as(x1, found_fc2[3])), need_fc1)
    if need_x1:
        projection = residual_linear.Arguments(
            out, a.out_weight, a.out_bias, None, a.layer_scale, a.drop_path_scale, a.kept
        )
        need = need_out, of.out_weight, of.out_bias, need_x, of.layer_scale
        found_out = residual_linear.backward(projection, (), (found_fc1[0],), need)
    if need_out:
        attention = softmax_attention.Arguments(by_head(projected, a.heads), a.softmax_scale, a.kept)
        of_heads: Any = softmax_attention.backward(attention, (out, log_sum_exp), (found_out[0], None), ())
        grads = [found.view(like.shape) for found, like in zip(of_heads, projected, strict=True)]
        norm = normalised_linear.Arguments(x, *a[:5], a.kept, None, "none")
        found_norm = normalised_linear.backward(norm, (), (*grads, _as(x, found_out[3])), need_norm)

    projections = len(a.weights)
    of_weights, of_biases = found_norm[3 : 3 + projections], found_norm[3 + projections :]
    return [
        *found_norm[:3], None, *of_weights, *of_biases, None, None, *found_out[1:3], found_out[4], *[None] * 4,
        *found_fc1[1:3], None, *found_fc1[3:], *found_fc2[1:3], None, found_fc2[4], *[None] * 4,
    ]  # fmt: skip


def _as(residual: Tensor, grad: Tensor | None) -> Tensor | None:
    """As autograd hands a gradient on: where LayerScale widens the residual stream, it has another dtype."""
    return None if grad is None else as_dtype(grad, residual.dtype)


_inference = Chain("block", _one_by_one)
_training = Chain("block_training", _forward)
_gradients = Chain("block_backward", _backward)
CHAINS = _inference, _training, _gradients


class TransformerBlock(torch.autograd.Function):
    """The block as one node."""

    @staticmethod
    def forward(ctx: Any, projections: int, *flat: Any) -> Tensor:
        y, *kept = _training.run(flat, *_gathered(projections, flat))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*[each if isinstance(each, Tensor) else None for each in flat], *kept)
        ctx.autocast = torch.is_autocast_enabled(y.device.type)
        ctx.projections, ctx.numbers = projections, [None if isinstance(each, Tensor) else each for each in flat]
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        # Each asked for once: a checkpoint gives its tensors no second time.
        numbers, saved, (_, *needs) = ctx.numbers, ctx.saved_tensors, ctx.needs_input_grad
        if grad is None:
            return (None,) * (1 + len(numbers))
        flat = [t if t is not None else n for t, n in zip(saved, numbers, strict=False)]
        if torch.is_grad_enabled():
            return None, *derivatives(partial(_again, ctx.projections, ctx.autocast), flat, needs, [grad])
        kept = saved[len(numbers) :]
        arguments = grad, *_gathered(ctx.projections, flat), kept, needs
        if not undisturbed() or batches_gradients() or not backend.use_triton(grad):
            return None, *_backward(*arguments)
        return None, *_gradients.run((grad, *flat, *kept, tuple(needs)), *arguments)


def _again(projections: int, autocast: bool, *flat: Any) -> list[Tensor]:
    """The block's result. autocast: whether the weights were cast, and x need not have their dtype."""
    x, attention, mlp = _gathered(projections, flat)
    dtype = attention.weights[0].dtype
    with torch.autocast(x.device.type, dtype, enabled=autocast, cache_enabled=False):
        return [_one_by_one(x, attention, mlp)]


# Past what Function does for torch.func alone, whose transforms never come here.
_apply = super(torch.autograd.Function, TransformerBlock).apply
