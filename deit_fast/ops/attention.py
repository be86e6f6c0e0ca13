"""Softmax attention of every token to every token (Vaswani et al. 2017, equation 1), no mask, no dropout."""

import torch
from torch import Tensor

from deit_fast.kernels import attention as kernels
from deit_fast.ops import checks, drop_path
from deit_fast.ops.attention_backward import attention_backward, attention_qkv_backward
from deit_fast.ops.registration import cast, register


def stock_attention_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        out, log_sum_exp = _explicit(q, k, v, scale)
    elif q.device.type == "cpu":
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif q.is_cuda and q.dtype is not torch.float64:
        out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        log_sum_exp = log_sum_exp[..., :tokens]
    else:
        out, log_sum_exp = _explicit(q, k, v, scale)
    log_sum_exp = log_sum_exp.to(log_sum_exp_dtype(q)).contiguous()
    # Laid out as q in PyTorch's operators.
    return out.transpose(1, 2).reshape(batch, tokens, heads * head_dim).contiguous(), log_sum_exp


def log_sum_exp_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-2, -1)) * scale
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def _stock_attention(qkv: Tensor, scale: float, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    outputs = stock_attention_qkv(*drop_path.filled(qkv, kept).unbind(2), scale)
    return tuple(drop_path.with_room(t, qkv.shape[0]) for t in outputs)


def _check_attention(qkv: Tensor, scale: float, kept: Tensor | None) -> None:
    checks.floating("attention", "qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"deit_fast.attention: qkv must have shape [batch, tokens, 3, heads, head_dim], got {tuple(qkv.shape)}"
        )
    drop_path.check_packed("attention", qkv, kept)


def _check_attention_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    op = "attention_qkv"
    checks.floating(op, "q", q)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
        raise ValueError(
            f"deit_fast.{op}: q, k and v must have shape [batch, tokens, heads, head_dim], k and v the same, got "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"deit_fast.{op}: q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    checks.same_device(op, q, k=k, v=v)


def _fake(q: Tensor, *_) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape[0], q.shape[1], q.shape[-2], q.shape[-1]
    return (
        q.new_empty((batch, tokens, heads * head_dim)),
        q.new_empty((batch, heads, tokens), dtype=log_sum_exp_dtype(q)),
    )


def _save(ctx, args, outputs):
    qkv, scale, kept = args
    ctx.save_for_backward(qkv, *outputs, kept)
    ctx.mark_non_differentiable(outputs[1])
    ctx.scale = scale


def _backward(ctx, grad, _):
    qkv, out, log_sum_exp, kept = ctx.saved_tensors
    return attention_backward(grad, qkv, out, log_sum_exp, ctx.scale, kept), None, None


def _save_qkv(ctx, args, outputs):
    *inputs, scale = args
    ctx.save_for_backward(*inputs, *outputs)
    ctx.mark_non_differentiable(outputs[1])
    ctx.scale = scale


def _backward_qkv(ctx, grad, _):
    return *attention_qkv_backward(grad, *ctx.saved_tensors, ctx.scale), None


_attention = register(
    "attention",
    "(Tensor qkv, float scale, Tensor? kept) -> (Tensor, Tensor)",
    check=_check_attention,
    stock=_stock_attention,
    triton=kernels.attention,
    unsupported=lambda qkv, scale, kept: kernels.unsupported(qkv.shape[-1], scale, qkv) or checks.kernel_products(qkv),
    fake=_fake,
    autocast=lambda dtype, qkv, scale, kept: (cast(qkv, dtype), scale, kept),
    save=_save,
    backward=_backward,
)

_attention_qkv = register(
    "attention_qkv",
    "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
    check=_check_attention_qkv,
    stock=stock_attention_qkv,
    triton=kernels.attention_qkv,
    unsupported=lambda q, k, v, scale: kernels.unsupported(q.shape[-1], scale, q) or checks.kernel_products(q),
    fake=_fake,
    autocast=lambda dtype, q, k, v, scale: (cast(q, dtype), cast(k, dtype), cast(v, dtype), scale),
    save=_save_qkv,
    backward=_backward_qkv,
)


def attention(qkv: Tensor, scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q kᵀ) v` from packed `qkv` [B, N, 3, H, d] of any strides.

    Returns the output [B, N, H·d] and the log-sum-exp of the scaled scores [B, H, N], float32
    (float64 for float64 inputs), which has no gradient.
    Kernels for d = 32, 64, 80, 96, 128; other head widths use the stock operator.
    With `kept` (`keep_samples`) for the kept samples alone: everything is packed.
    """
    return _attention(qkv, scale, kept)


def attention_qkv(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `attention`, from separate q [B, N, H, d] and k, v [B, M, H, d] of any strides."""
    return _attention_qkv(q, k, v, scale)
