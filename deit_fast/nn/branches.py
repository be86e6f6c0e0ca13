"""The two halves of a pre-norm block, read from the modules that the blocks of every library are made of."""

from collections.abc import Sequence

from torch import Tensor

from deit_fast import ops
from deit_fast.nn.drop_path import DropPathDraw
from deit_fast.nn.parts import Part, weight_and_bias


def attention_half(
    norm: Part,
    projections: Sequence[Part],
    out_proj: Part,
    heads: int,
    softmax_scale: float,
    layer_scale: Tensor | None,
    drop_path: DropPathDraw,
    readout_rows: int = 0,
) -> ops.AttentionHalf:
    """projections: the packed one of q, k and v, or these three. layer_scale: factors [D]."""
    weights, biases = zip(*map(weight_and_bias, projections), strict=True)
    return ops.AttentionHalf(
        *weight_and_bias(norm),
        norm.eps,
        list(weights),
        list(biases),
        heads,
        softmax_scale,
        *weight_and_bias(out_proj),
        layer_scale,
        drop_path.scale,
        drop_path.kept,
        drop_path.capacity,
        readout_rows,
    )


def mlp_half(
    norm: Part,
    fc1: Part,
    fc2: Part,
    layer_scale: Tensor | None,
    drop_path: DropPathDraw,
    activation: str,
    memory: str,
) -> ops.MlpHalf:
    """layer_scale: factors [D]. activation: "gelu" or "gelu_tanh"."""
    return ops.MlpHalf(
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
