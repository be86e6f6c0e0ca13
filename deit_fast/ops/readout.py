"""Attention for the few rows that a classifier reads, without the keys and values of the others.

The algebra is in `reference/readout.py`: keys' and values' weights go to the queries and to what the softmax summed,
so that one pass over x is left. Two parts have kernels; the small products around them are torch's in either path.

Backward takes x's gradient in one pass, the parameters' from the few rows that were read. With du the gradient of what
the values' weight multiplies, a the absorbed queries, z what the softmax summed, p its weights and x̂ the normalised
rows:

    dz = γ du,  ds = p (dz · x̂ − dz · z),  dx̂ = Σ p dz + ds γ a,  da = γ Σ ds x̂,
    dγ = Σ du z + a Σ ds x̂,  dβ = Σ du, and then what flows back through the queries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deit_fast.kernels import linear as linear_kernels
from deit_fast.kernels import readout as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flops import product_flops
from deit_fast.ops.layer_norm_linear import (
    check_projections,
    layer_norm_linear_backward,
    normalised_linear,
)
from deit_fast.ops.operator import BackwardOperator, Operator, distribute, empty_gradients
from deit_fast.ops.product_dtype import as_dtype, product_dtype


def _separate(parameters: Sequence[Tensor | None]) -> Sequence[Any]:
    """Of q, of k and of v, from one packed parameter or three."""
    if len(parameters) == 3:
        return parameters
    (packed,) = parameters
    return (None,) * 3 if packed is None else packed.chunk(3)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """`weight * x + bias`, LayerNorm's second half."""
    x = x if weight is None else x * as_dtype(weight, x.dtype)
    return x if bias is None else x + as_dtype(bias, x.dtype)


def _to_heads(x: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """Head by head `scale * x @ weight`: x [B, R, H·K], weight [H, K, L] → [B, R, H, L], in the weight's dtype."""
    heads, depth, width = weight.shape
    dtype = product_dtype(weight)
    rows = as_dtype(x, dtype).reshape(-1, heads, depth).transpose(0, 1)
    weight_, none = as_dtype(weight, dtype), rows.new_empty(())
    product = torch.baddbmm(none, rows, weight_, beta=0, alpha=scale).transpose(0, 1)
    # Row by row in memory, as a compiler that has only seen shapes takes it to be.
    return as_dtype(product, weight.dtype).contiguous().view(*x.shape[:2], heads, width)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x̂ in float32 (float64 for float64), and the mean and 1 / standard deviation of each row."""
    x = as_dtype(x, torch.promote_types(x.dtype, torch.float32))
    return torch.ops.aten.native_layer_norm(x, [x.shape[-1]], None, None, eps)


# Forward ----------------------------------------------------------------------------------------------------------


def _stock_readout(
    x: Tensor, absorbed: Tensor, norm_weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    normalised, _, _ = _normalised(x, eps)
    queries = _affine(absorbed.to(normalised.dtype), norm_weight, None).flatten(1, 2)
    scores = queries @ normalised.mT
    log_sum_exp = scores.logsumexp(-1)
    summed = scores.softmax(-1) @ normalised
    return summed.view(absorbed.shape), log_sum_exp.view(absorbed.shape[:-1])


def _forward(
    layer_norm_linear: Callable[..., Sequence[Tensor]],
    readout: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    readout_rows: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The operator, with either form of its two parts."""
    q_weight, k_weight, v_weight = _separate(weights)
    q_bias, _, v_bias = _separate(biases)
    dtype = q_weight.dtype
    rows = x[:, :readout_rows]
    (q,) = layer_norm_linear(rows, norm_weight, norm_bias, eps, [q_weight], [q_bias], None, None, "none")
    by_head = (num_heads, -1, x.shape[-1])
    absorbed = _to_heads(q, k_weight.view(by_head), scale)
    summed, log_sum_exp = readout(x, absorbed, norm_weight, eps, dtype)
    weighted = as_dtype(_affine(summed, norm_weight, norm_bias), dtype)
    out = _to_heads(weighted.flatten(2), v_weight.view(by_head).mT).flatten(2)
    if v_bias is not None:
        out = out + as_dtype(v_bias, dtype)
    return out, rows.clone(memory_format=torch.contiguous_format), q, absorbed, summed, log_sum_exp


def _launched(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _forward(linear_kernels.layer_norm_linear, kernels.readout, *args)


# Backward ---------------------------------------------------------------------------------------------------------


def _stock_readout_backward(
    x: Tensor,
    absorbed: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    summed: Tensor,
    log_sum_exp: Tensor,
    dsummed: Tensor,
    _: torch.dtype,
) -> tuple[Tensor, Tensor]:
    normalised, mean, rstd = _normalised(x, eps)
    queries = _affine(absorbed.to(normalised.dtype), norm_weight, None).flatten(1, 2)
    dsummed, summed = (t.reshape(queries.shape) for t in (dsummed, summed))
    weights = (queries @ normalised.mT - log_sum_exp.flatten(1).unsqueeze(-1)).exp_()
    dscores = dsummed @ normalised.mT - (dsummed * summed).sum(-1, keepdim=True)
    dscores *= weights
    dabsorbed = (dscores @ normalised).view(absorbed.shape)
    dnormalised = torch.baddbmm(weights.mT @ dsummed, dscores.mT, queries)
    wide = as_dtype(x, normalised.dtype)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        dnormalised, wide, [x.shape[-1]], mean, rstd, None, None, [True, False, False]
    )
    return as_dtype(dx, x.dtype), dabsorbed


def _backward(
    layer_norm_linear_backward: Callable[..., list[Tensor]],
    readout_backward: Callable[..., tuple[Tensor, Tensor]],
    grad: Tensor,
    residual_grad: Tensor | None,
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor | None],
    q: Tensor,
    absorbed: Tensor,
    summed: Tensor,
    log_sum_exp: Tensor,
    heads: int,
    scale: float,
    needs: list[bool],
) -> list[Tensor]:
    """The operator, with either form of its two parts."""
    need_x, need_norm_weight, need_norm_bias, need_q, need_k, need_v, need_q_bias, need_k_bias, need_v_bias = needs
    q_weight, k_weight, v_weight = weights
    dtype, wide, depth = q_weight.dtype, summed.dtype, x.shape[-1]
    k_by_head, v_by_head = (w.view(heads, -1, depth) for w in (k_weight, v_weight))
    gradients: dict[str, Any] = {}
    if need_v:
        weighted = as_dtype(_affine(summed, norm_weight, norm_bias), dtype)
        gradients["v"] = _weight_gradient(_by_head(grad, heads), weighted)
    if need_v_bias:
        gradients["v_bias"] = grad.sum((0, 1), dtype=wide)
    if need_k_bias and biases[1] is not None:
        gradients["k_bias"] = torch.zeros_like(biases[1])

    if need_x or need_norm_weight or need_norm_bias or need_q or need_k or need_q_bias:
        dweighted = _to_heads(grad, v_by_head).to(wide)
        dsummed = _affine(dweighted, norm_weight, None)
        dx, dscaled = readout_backward(x, absorbed, norm_weight, eps, summed, log_sum_exp, dsummed, dtype)
        dabsorbed = as_dtype(_affine(dscaled, norm_weight, None), dtype)
        if need_k:
            gradients["k"] = _weight_gradient(_by_head(q, heads), dabsorbed) * scale
        dq = _to_heads(dabsorbed, k_by_head.mT, scale).view(q.shape)
        q_needs = [need_x, need_norm_weight, need_norm_bias, need_q, need_q_bias]
        rows = x[:, : q.shape[1]]
        found = layer_norm_linear_backward(
            rows, norm_weight, norm_bias, eps, [dq], [q_weight], [biases[0]], None, residual_grad, q_needs
        )
        of_rows, of_norm_weight, of_norm_bias, of_q, of_q_bias = distribute(found, q_needs)
        gradients |= {"q": of_q, "q_bias": of_q_bias}
        if need_x:
            gradients["x"] = dx
            dx[:, : q.shape[1]] += of_rows
        if need_norm_weight:
            here = dweighted * summed + absorbed.to(wide) * dscaled
            gradients["norm_weight"] = here.sum((0, 1, 2)) + of_norm_weight
        if need_norm_bias:
            gradients["norm_bias"] = dweighted.sum((0, 1, 2)) + of_norm_bias

    inputs = (x, norm_weight, norm_bias, *weights, *biases)
    names = ("x", "norm_weight", "norm_bias", "q", "k", "v", "q_bias", "k_bias", "v_bias")
    return [
        gradients[name].to(i.dtype)
        for name, i, need in zip(names, inputs, needs, strict=True)
        if need and i is not None
    ]


# Neither `flatten` nor `unflatten`: batched gradients have no rule for them.


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[B, R, H·K] → [B, R, H, K]."""
    return x.view(*x.shape[:-1], heads, x.shape[-1] // heads)


def _all_rows(x: Tensor) -> Tensor:
    """[B, R, …] → [B·R, …]."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


def _weight_gradient(of_output: Tensor, of_input: Tensor) -> Tensor:
    """Head by head `of_outputᵀ @ of_input`: [B, R, H, K] and [B, R, H, L] → [H·K, L]."""
    dtype = product_dtype(of_input)
    left, right = (_all_rows(as_dtype(t, dtype)).transpose(0, 1) for t in (of_output, of_input))
    return _all_rows(torch.bmm(left.transpose(1, 2), right))


def _launched_backward(*args: Any) -> list[Tensor]:
    return _backward(linear_kernels.layer_norm_linear_backward, kernels.readout_backward, *args)


# Operators --------------------------------------------------------------------------------------------------------


def _flops(x: Tensor, q_weight: Tensor, rows: int, heads: int) -> tuple[int, int]:
    """One product with a projection's weight for the rows read; one with all tokens' normalised rows."""
    batch, tokens, width = x.shape
    return product_flops(batch * rows, q_weight), 2 * batch * rows * heads * tokens * width


class _ReadoutAttentionBackward(BackwardOperator):
    """Of separate q, k and v."""

    name = "readout_attention_backward"
    launcher = staticmethod(_launched_backward)

    @staticmethod
    def stock(
        grad: PerSample,
        residual_grad: PerSample | None,
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        weights: list[Shared],
        biases: list[Shared | None],
        q: PerSample,
        absorbed: PerSample,
        summed: PerSample,
        log_sum_exp: PerSample,
        num_heads: int,
        scale: float,
        needs: list[bool],
    ) -> list[Tensor]:
        return _backward(
            type(layer_norm_linear_backward).stock, _stock_readout_backward, grad, residual_grad, x, norm_weight,
            norm_bias, eps, weights, biases, q, absorbed, summed, log_sum_exp, num_heads, scale, needs,
        )  # fmt: skip

    def differentiable(self, *args: Any) -> list[Tensor]:
        grad, residual_grad, x, norm_weight, norm_bias, eps, weights, biases, q, *_, num_heads, scale, needs = args
        _, _, q, absorbed, summed, log_sum_exp = _forward(
            type(normalised_linear).stock, _stock_readout, x, norm_weight, norm_bias, eps, weights, biases, q.shape[1],
            num_heads, scale,
        )  # fmt: skip
        return self.stock(
            grad, residual_grad, x, norm_weight, norm_bias, eps, weights, biases, q, absorbed, summed, log_sum_exp,
            num_heads, scale, needs,
        )  # fmt: skip

    def unsupported(self, a: Any) -> str | None:
        return kernels.unsupported(a.x.shape[-1], a.weights[0].dtype) or checks.kernel_products(
            *a.weights, a.grad, a.residual_grad, a.x, a.norm_weight, a.norm_bias
        )

    def fake(self, a: Any) -> list[Tensor]:
        return empty_gradients((a.x, a.norm_weight, a.norm_bias, *a.weights, *a.biases), a.needs)

    def flops(self, a: Any) -> int:
        need_x, need_norm_weight, need_norm_bias, need_q, need_k, need_v, need_q_bias, *_ = a.needs
        projection, over_tokens = _flops(a.x, a.weights[0], a.q.shape[1], a.num_heads)
        of_norm = need_x or need_norm_weight or need_norm_bias
        found = need_v * projection
        if of_norm or need_q or need_k or need_q_bias:
            found += (2 + need_k + of_norm + need_q) * projection + 5 * over_tokens
        return found


readout_attention_backward = _ReadoutAttentionBackward()


class _ReadoutAttention(Operator):
    """Returns, besides what `readout_attention` says, q, the absorbed queries, what the softmax summed and its
    log-sum-exp: backward reads them.
    """

    name = "readout_attention"
    launcher = staticmethod(_launched)
    casts = ("weights",)
    saves = ("x", "norm_weight", "norm_bias", "weights", "biases")
    saves_outputs = (2, 3, 4, 5)
    data_outputs = (2, 3, 4, 5)
    own_backward = True

    @staticmethod
    def stock(
        x: PerSample,
        norm_weight: Shared | None,
        norm_bias: Shared | None,
        eps: float,
        weights: list[Shared],
        biases: list[Shared | None],
        readout_rows: int,
        num_heads: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        parameters = (norm_weight, norm_bias, eps, weights, biases)
        return _forward(type(normalised_linear).stock, _stock_readout, x, *parameters, readout_rows, num_heads, scale)

    def check(self, a: Any) -> None:
        check_projections(self.name, a.x, a.norm_weight, a.norm_bias, a.weights, a.biases)
        width = sum(weight.shape[0] for weight in a.weights)
        if width % 3:
            raise ValueError(
                f"deit_fast.{self.name}: a packed weight must be that of q, k and v, one below the other; has "
                f"{a.weights[0].shape}"
            )
        checks.token_sequence(self.name, "the input", a.x)
        if not 1 <= a.readout_rows <= a.x.shape[1]:
            raise ValueError(
                f"deit_fast.{self.name}: readout_rows must be from 1 to the {a.x.shape[1]} tokens, got {a.readout_rows}"
            )
        checks.heads_divide(self.name, width // 3, a.num_heads)

    def unsupported(self, a: Any) -> str | None:
        return kernels.forward_unsupported(a.x, a.weights[0].dtype) or checks.kernel_products(
            *a.weights, *a.biases, a.x, a.norm_weight, a.norm_bias
        )

    def fake(self, a: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, _, depth = a.x.shape
        dtype, width = a.weights[0].dtype, sum(weight.shape[0] for weight in a.weights) // 3
        wide = torch.promote_types(dtype, torch.float32)
        per_head = (batch, a.readout_rows, a.num_heads)
        return (
            a.x.new_empty((batch, a.readout_rows, width), dtype=dtype),
            a.x.new_empty((batch, a.readout_rows, depth)),
            a.x.new_empty((batch, a.readout_rows, width), dtype=dtype),
            a.x.new_empty((*per_head, depth), dtype=dtype),
            a.x.new_empty((*per_head, depth), dtype=wide),
            a.x.new_empty(per_head, dtype=wide),
        )

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad, residual_grad, *_ = grads
        q, absorbed, summed, log_sum_exp = outputs
        if grad is None:
            grad = torch.zeros_like(q)
        if len(a.weights) == 1:
            *of_norm, of_weight, of_bias = needs
            needs = [*of_norm, *[of_weight] * 3, *[of_bias] * 3]
        found = readout_attention_backward(
            grad, residual_grad, a.x, a.norm_weight, a.norm_bias, a.eps, _separate(a.weights), _separate(a.biases),
            q, absorbed, summed, log_sum_exp, a.num_heads, a.scale, needs,
        )  # fmt: skip
        gradients = distribute(found, needs)
        if len(a.weights) > 1:
            return gradients
        parts = gradients[3:6], gradients[6:]
        return *gradients[:3], *[None if part[0] is None else torch.cat(part) for part in parts]

    def flops(self, a: Any) -> int:
        projection, over_tokens = _flops(a.x, _separate(a.weights)[0], a.readout_rows, a.num_heads)
        return 3 * projection + 2 * over_tokens

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        for title, widths in (("", [3 * size.attended]), ("separate q, k, v", [size.attended] * 3)):
            arguments = {"x": new.sequence(), **new.norm(), **new.projections(*widths)}
            options = {"readout_rows": size.readout_rows, "num_heads": size.heads, "scale": size.scale}
            yield Example(title, {**arguments, **options})


_readout_attention = _ReadoutAttention()


def readout_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    readout_rows: int,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention(LayerNorm(x)) of the first R = `readout_rows` rows, before the projection, and those rows of x.

    x [B, N, D], norm_weight and norm_bias [D]; weights and biases: one packed [3W, D] and [3W], those of q, k and v
    one below the other, or three [W, D] and [W]. → [B, R, W] in the weights' dtype, and x's rows [B, R, D], whose
    gradient joins x's in the same backward. The bias of k has the gradient 0.
    """
    if x.dtype is not weights[0].dtype:
        checks.same_dtype("readout_attention", x, weights[0])
    outputs = _readout_attention(x, norm_weight, norm_bias, eps, weights, biases, readout_rows, num_heads, scale)
    return outputs[0], outputs[1]
