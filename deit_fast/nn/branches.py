"""The two branches of a pre-norm block with their residuals, which the blocks of every library are made of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.nn.drop_path import DropPathDraw
from deit_fast.nn.parts import Part, weight_and_bias


def attention_residual(
    x: Tensor,
    norm: Part,
    projections: Sequence[Part],
    out_proj: Part,
    heads: int,
    softmax_scale: float,
    layer_scale: Tensor | None,
    drop_path: DropPathDraw,
    readout_rows: int = 0,
) -> Tensor:
    """The attention half of a block, x [B, N, D] → [B, N, D], in three operators.

    projections: the packed one of q, k and v, or these three. layer_scale: factors [D].
    readout_rows: R > 0 gives the first R rows alone, [B, R, D], and computes no other beyond its part in their
    attention (`ops.readout_attention`); for all samples, whichever `drop_path` keeps.
    """
    scale, kept, capacity = drop_path
    parameters = (*weight_and_bias(norm), norm.eps, *weights_and_biases(projections))
    if readout_rows:
        out, x = ops.readout_attention(x, *parameters, readout_rows, heads, softmax_scale)
    else:
        projected, x = ops.layer_norm_linear_branching(x, *parameters, kept, capacity)
        out = attend(projected, heads, softmax_scale, kept)
    return ops.linear_residual(out, *weight_and_bias(out_proj), x, layer_scale, scale, kept)


def attend(projected: Sequence[Tensor], heads: int, softmax_scale: float, kept: Tensor | None = None) -> Tensor:
    """Attention before the output projection, from packed qkv [B, N, 3·H·d] or from q, k, v [B, N, H·d].

    Returns [B, N, H·d]; with `kept`, packed as `projected` is (`ops.attention`).
    """
    batch, tokens, width = projected[0].shape
    if len(projected) == 1:
        by_head = [projected[0].view(batch, tokens, 3, heads, width // (3 * heads))]
    else:
        by_head = [each.view(batch, tokens, heads, width // heads) for each in projected]
    return ops.attention(by_head, softmax_scale, kept)[0]


def weights_and_biases(projections: Sequence[Part]) -> tuple[list[Tensor], list[Tensor | None]]:
    """[N, K] and [N] or None, as the operators take them."""
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    return list(weights), list(biases)


def mlp_residual(
    x: Tensor,
    norm: Part,
    fc1: Part,
    fc2: Part,
    layer_scale: Tensor | None,
    drop_path: DropPathDraw,
    activation: str,
    memory: str,
) -> Tensor:
    """The MLP half of a block, x [B, N, D] → [B, N, D]; layer_scale: factors [D].

    In two operators; in one without gradients where that is faster (`ops.mlp_fits`), and with them where nothing is
    kept of what goes into the activation (`memory="low"`): backward computes it again.
    """
    scale, kept, capacity = drop_path
    parameters = *weight_and_bias(norm), norm.eps
    training = torch.is_grad_enabled()
    if memory == "low" if training else ops.mlp_fits(x):
        return ops.mlp(
            x,
            *parameters,
            *weight_and_bias(fc1),
            *weight_and_bias(fc2),
            layer_scale,
            scale,
            activation,
            kept,
        )
    if training:
        (hidden, activated), x = ops.layer_norm_fc1_branching(
            x, *parameters, *weight_and_bias(fc1), activation, kept, capacity
        )
        return ops.fc2_residual(hidden, activated, *weight_and_bias(fc2), x, layer_scale, scale, activation, kept)
    (activated,) = ops.layer_norm_linear(x, *parameters, *weights_and_biases((fc1,)), kept, capacity, activation)
    return ops.linear_residual(activated, *weight_and_bias(fc2), x, layer_scale, scale, kept)
