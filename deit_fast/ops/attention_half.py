"""The attention half of a pre-norm block, and its residual: LayerNorm, q, k and v, attention, output projection."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from deit_fast.ops.attention import attend, by_head, softmax_attention
from deit_fast.ops.half import Half, gradients_of, like
from deit_fast.ops.layer_norm_linear import layer_norm_linear_branching, normalised_linear
from deit_fast.ops.linear import linear_residual, residual_linear
from deit_fast.ops.readout import readout_attention


class AttentionHalf(NamedTuple):
    """norm_weight, norm_bias [D]; out_weight [D, H·d], out_bias and layer_scale [D].

    drop_path_scale [B], kept, capacity: a draw of drop path (`ops.keep_samples`). readout_rows: R > 0 for the first R
    rows alone, for all samples, whichever are kept (`ops.readout_attention`). weights, biases: of the packed projection
    of q, k and v, or of these three, each [N, D] and [N].
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    heads: int
    softmax_scale: float
    out_weight: Tensor
    out_bias: Tensor | None
    layer_scale: Tensor | None
    drop_path_scale: Tensor | None
    kept: Tensor | None
    capacity: int | None
    readout_rows: int
    weights: list[Tensor]
    biases: list[Tensor | None]


# The fields that are no lists.
_SINGLE = len(AttentionHalf._fields) - 2


class _Attention(Half):
    name = "attention_half"
    matrices = ("weights", "out_weight")
    first = ("norm_weight", "norm_bias", "weights", "biases")

    def one_by_one(self, x: Tensor, a: AttentionHalf) -> Tensor:
        norm, projections = (a.norm_weight, a.norm_bias, a.eps), (a.weights, a.biases)
        if a.readout_rows:
            out, x = readout_attention(x, *norm, *projections, a.readout_rows, a.heads, a.softmax_scale)
        else:
            projected, x = layer_norm_linear_branching(x, *norm, *projections, a.kept, a.capacity)
            out = attend(projected, a.heads, a.softmax_scale, a.kept)
        return linear_residual(out, a.out_weight, a.out_bias, x, a.layer_scale, a.drop_path_scale, a.kept)

    def forward(self, x: Tensor, a: AttentionHalf) -> tuple[Tensor, ...]:
        norm = a.norm_weight, a.norm_bias, a.eps
        projected = normalised_linear(x, *norm, a.weights, a.biases, a.kept, a.capacity, "none")
        out, log_sum_exp = softmax_attention(by_head(projected, a.heads), a.softmax_scale, a.kept)
        y = residual_linear(out, a.out_weight, a.out_bias, x, a.layer_scale, a.drop_path_scale, a.kept)
        return y, *projected, out, log_sum_exp

    def backward(
        self, grad: Tensor, x: Tensor, a: AttentionHalf, kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple:
        *projected, out, log_sum_exp = kept
        need_x, need = self.gathered(needs)
        projection = residual_linear.Arguments(
            out, a.out_weight, a.out_bias, None, a.layer_scale, a.drop_path_scale, a.kept
        )
        wanted = True, need.out_weight, need.out_bias, need_x, need.layer_scale
        dout, dout_weight, dout_bias, dx, dlayer_scale = residual_linear.backward(projection, (), (grad,), wanted)

        attention = softmax_attention.Arguments(by_head(projected, a.heads), a.softmax_scale, a.kept)
        of_heads: Any = softmax_attention.backward(attention, (out, log_sum_exp), (dout, None), ())
        del dout
        grads = [found.view(of.shape) for found, of in zip(of_heads, projected, strict=True)]

        norm = normalised_linear.Arguments(
            x, a.norm_weight, a.norm_bias, a.eps, a.weights, a.biases, a.kept, None, "none"
        )
        wanted = need_x, need.norm_weight, need.norm_bias, *need.weights, *need.biases
        dx, dnorm_weight, dnorm_bias, *of_projections = normalised_linear.backward(
            norm, (), (*grads, like(x, dx)), wanted
        )
        count = len(a.weights)
        found = gradients_of(
            a,
            norm_weight=dnorm_weight,
            norm_bias=dnorm_bias,
            out_weight=dout_weight,
            out_bias=dout_bias,
            layer_scale=dlayer_scale,
            weights=of_projections[:count],
            biases=of_projections[count:],
        )
        return self.flat(dx, found)

    def flat(self, x: Tensor | None, a: AttentionHalf) -> tuple:
        return (x, *a[:_SINGLE], *a.weights, *a.biases)

    def gathered(self, flat: Sequence[Any]) -> tuple[Any, Any]:
        x, *rest = flat
        projections = rest[_SINGLE:]
        count = len(projections) // 2
        return x, AttentionHalf._make((*rest[:_SINGLE], projections[:count], projections[count:]))

    def has_one_dtype(self, x: Tensor, a: AttentionHalf) -> bool:
        return x.dtype is a.weights[0].dtype is a.out_weight.dtype

    def chains(self, a: AttentionHalf) -> bool:
        return not a.readout_rows


attention_half = _Attention()
