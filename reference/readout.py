"""The last block of a model that reads only its first R rows (the CLS and distillation tokens), and no more than that.

Attention from R rows needs no keys and values of the other tokens, only weighted sums of LN(x). By head, with
k_n = W_k LN(x_n) + b_k and v_n = W_v LN(x_n) + b_v,

    q · k_n = (W_kᵀ q) · LN(x_n) + q · b_k       the last term is the same for every n and cancels in the softmax
    Σ_n p_n v_n = W_v Σ_n p_n LN(x_n) + b_v      since Σ_n p_n = 1

and LN(x) = γ x̂ + β, where β in turn adds the same to every score. Outputs and gradients are those of the whole block;
that of b_k is 0.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.layer_norm import layer_norm
from reference.linear import layer_norm_linear, linear_residual
from reference.mlp import mlp


def readout(x: Tensor, absorbed: Tensor, norm_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Σ_n p_n x̂_n with p = softmax_n(a · γ x̂_n), and the logarithm of each softmax's denominator.

    x: [B, N, D], x̂ its normalised rows; norm_weight γ: [D] or None; absorbed a: [B, R, H, D], the queries times the
    keys' weight and the scale; results: [B, R, H, D] and [B, R, H].
    """
    normalised = layer_norm(x, None, None, eps)
    query = absorbed if norm_weight is None else absorbed * norm_weight
    scores = torch.einsum("brhd,bnd->brhn", query, normalised)
    maximum = scores.amax(dim=-1, keepdim=True)
    exponentials = (scores - maximum).exp()
    denominator = exponentials.sum(dim=-1, keepdim=True)
    summed = torch.einsum("brhn,bnd->brhd", exponentials / denominator, normalised)
    return summed, (maximum + denominator.log()).squeeze(-1)


def readout_attention(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    q_weight: Tensor,
    q_bias: Tensor | None,
    k_weight: Tensor,
    v_weight: Tensor,
    v_bias: Tensor | None,
    num_heads: int,
    scale: float,
    readout_rows: int,
) -> Tensor:
    """Attention(LN(x)) of the first R = `readout_rows` rows, before the projection.

    x: [B, N, D]; norm_weight, norm_bias: [D] or None; weights: [D, D]; biases: [D] or None; result: [B, R, D], heads
    side by side.
    """
    width = x.shape[-1]
    q = layer_norm_linear(x[:, :readout_rows], norm_weight, norm_bias, eps, q_weight, q_bias)
    q = q.unflatten(-1, (num_heads, -1))
    k_by_head, v_by_head = (weight.reshape(num_heads, -1, width) for weight in (k_weight, v_weight))
    absorbed = scale * torch.einsum("brhe,hed->brhd", q, k_by_head)
    summed, _ = readout(x, absorbed, norm_weight, eps)
    if norm_weight is not None:
        summed = summed * norm_weight
    if norm_bias is not None:
        summed = summed + norm_bias
    out = torch.einsum("brhd,hed->brhe", summed, v_by_head).flatten(2)
    return out if v_bias is None else out + v_bias


def readout_block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    num_heads: int,
    readout_rows: int,
    eps: float = 1e-6,
    drop_path_scale1: Tensor | None = None,
    drop_path_scale2: Tensor | None = None,
) -> Tensor:
    """`block(…)[:, :R]` with R = `readout_rows`, and nothing computed for the other rows but their part in attention.

    x: [B, N, D]; parameters, drop_path_scale1, drop_path_scale2: as `block` takes them; result: [B, R, D].
    """
    get = parameters.get
    q_weight, k_weight, v_weight = parameters["attn.qkv.weight"].chunk(3)
    q_bias, _, v_bias = (None,) * 3 if get("attn.qkv.bias") is None else get("attn.qkv.bias").chunk(3)
    scale = (x.shape[-1] // num_heads) ** -0.5

    out = readout_attention(
        x, get("norm1.weight"), get("norm1.bias"), eps, q_weight, q_bias, k_weight, v_weight, v_bias,
        num_heads, scale, readout_rows,
    )  # fmt: skip
    rows = linear_residual(
        out,
        parameters["attn.proj.weight"],
        get("attn.proj.bias"),
        x[:, :readout_rows],
        get("ls1.gamma"),
        drop_path_scale1,
    )
    return mlp(
        rows,
        get("norm2.weight"),
        get("norm2.bias"),
        eps,
        parameters["mlp.fc1.weight"],
        get("mlp.fc1.bias"),
        parameters["mlp.fc2.weight"],
        get("mlp.fc2.bias"),
        get("ls2.gamma"),
        drop_path_scale2,
    )
