"""Gradients of attention, recomputed from q, k, v and the log-sum-exp (Dao et al. 2022, appendix B)."""

import torch
from torch import Tensor

from deit_fast.kernels import attention_backward as kernels
from deit_fast.kernels.attention import unsupported
from deit_fast.ops import checks, drop_path
from deit_fast.ops.product_dtype import as_dtype, product_dtype
from deit_fast.ops.registration import register_backward


def _stock_qkv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> list[Tensor]:
    batch, tokens, heads, head_dim = q.shape
    if q.numel() == 0 or k.numel() == 0:
        return [torch.zeros_like(t) for t in (q, k, v)]
    dtype, wide = q.dtype, product_dtype(q)
    grad, out = (t.view(batch, tokens, heads, head_dim) for t in (grad.contiguous(), out))
    grad, q, k, v, out = (as_dtype(t, wide).transpose(1, 2) for t in (grad, q, k, v, out))
    if q.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum_exp, 0.0, False, scale=scale
        )
    else:
        found = _explicit(grad, q, k, v, out, log_sum_exp, scale)
    return [as_dtype(t, dtype).transpose(1, 2) for t in found]


def _explicit(grad, q, k, v, out, log_sum_exp, scale):
    """dV = Pᵀ dO, dS = P (dO Vᵀ − rowsum(dO O)), dQ = scale dS K, dK = scale dSᵀ Q."""
    weights = torch.exp((q @ k.mT).mul(scale) - log_sum_exp.unsqueeze(-1)).to(q.dtype)
    delta = (grad * out).sum(-1, keepdim=True)
    of_scores = weights * (grad @ v.mT - delta) * scale
    return of_scores @ k, of_scores.mT @ q, weights.mT @ grad


def _stock(grad: Tensor, qkv: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    capacity = qkv.shape[0]
    grad, qkv, out, log_sum_exp = (drop_path.filled(t, kept) for t in (grad, qkv, out, log_sum_exp))
    found = torch.stack(_stock_qkv(grad, *qkv.unbind(2), out, log_sum_exp, scale), dim=2)
    return drop_path.with_room(found, capacity)


def _triton_qkv(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> list[Tensor]:
    found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)]
    kernels.attention_backward(grad, q, k, v, out, log_sum_exp, scale, *found)
    return found


def _triton(grad: Tensor, qkv: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    found = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    kernels.attention_backward(grad, *qkv.unbind(2), out, log_sum_exp, scale, *found.unbind(2), kept)
    return found


attention_backward = register_backward(
    "attention_backward",
    "(Tensor grad, Tensor qkv, Tensor out, Tensor log_sum_exp, float scale, Tensor? kept) -> Tensor",
    stock=_stock,
    triton=_triton,
    unsupported=lambda grad, qkv, out, log_sum_exp, scale, kept: (
        unsupported(qkv.shape[-1], scale, qkv) or checks.kernel_products(qkv, grad)
    ),
    fake=lambda grad, qkv, *_: torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device),
)

attention_qkv_backward = register_backward(
    "attention_qkv_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sum_exp, float scale) -> Tensor[]",
    stock=lambda *args: [t.contiguous() for t in _stock_qkv(*args)],
    triton=_triton_qkv,
    unsupported=lambda grad, q, *rest: unsupported(q.shape[-1], rest[-1], q) or checks.kernel_products(q, grad),
    fake=lambda grad, q, k, v, *_: [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v)],
)
