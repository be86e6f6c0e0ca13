"""Multi-head self-attention (Vaswani et al., arXiv 1706.03762, equation 1; ViT, equations 5 to 8)."""

import torch
from torch import Tensor


def attention(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention_qkv` of packed queries, keys and values.

    qkv: [B, N, 3, H, d]; results: out [B, N, H·d] and log_sum_exp [B, H, N].
    """
    q, k, v = qkv.unbind(dim=2)
    return attention_qkv(q, k, v, scale)


def attention_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v by head, no mask, and the logarithm of each softmax's denominator.

    s_ij = scale · q_i · k_j,  L_i = log Σ_j exp s_ij,  out_i = Σ_j exp(s_ij − L_i) v_j.
    The row's maximum is taken out of the sum so that no exponential overflows; it cancels.

    q: [B, N, H, d]; k, v: [B, M, H, d]; results: out [B, N, H·d] (heads side by side) and log_sum_exp L:
    [B, H, N], natural logarithm.
    """
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    maximum = scores.amax(dim=-1, keepdim=True)
    exponentials = (scores - maximum).exp()
    denominator = exponentials.sum(dim=-1, keepdim=True)
    out = torch.einsum("bhij,bjhd->bihd", exponentials / denominator, v)
    log_sum_exp = (maximum + denominator.log()).squeeze(-1)
    return out.flatten(2), log_sum_exp
