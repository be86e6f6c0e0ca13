"""The two halves of a pre-norm block, from the modules that the blocks of every library are made of."""

from collections.abc import Sequence

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
    """The attention half of a block, x [B, N, D] → [B, N, D].

    projections: the packed one of q, k and v, or these three. layer_scale: factors [D]. readout_rows: R > 0 gives the
    first R rows alone, [B, R, D].
    """
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    half = ops.AttentionHalf(
        *weight_and_bias(norm),
        norm.eps,
        heads,
        softmax_scale,
        *weight_and_bias(out_proj),
        layer_scale,
        drop_path.scale,
        drop_path.kept,
        drop_path.capacity,
        readout_rows,
        list(weights),
        list(biases),
    )
    return ops.attention_half(x, half)


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
    """The MLP half of a block, x [B, N, D] → [B, N, D]; layer_scale: factors [D]."""
    half = ops.MlpHalf(
        *weight_and_bias(norm),
        norm.eps,
        *weight_and_bias(fc1),
        *weight_and_bias(fc2),
        activation,
        layer_scale,
        drop_path.scale,
        drop_path.kept,
        drop_path.capacity,
        memory,
    )
    return ops.mlp_half(x, half)
