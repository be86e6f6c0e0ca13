"""Softmax attention of every token to every token (Vaswani et al. 2017, equation 1), no mask, no dropout.

Its gradients are recomputed from q, k, v and the log-sum-exp (Dao et al. 2022, appendix B). q, k and v come packed in
one tensor or as three.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast.kernels import attention as kernels
from deit_fast.ops import backend, checks, drop_path
from deit_fast.ops.arguments import PerSample, Shared
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.flops import samples_computed
from deit_fast.ops.operator import BackwardOperator, Operator
from deit_fast.ops.product_dtype import as_dtype, product_dtype


def log_sum_exp_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, head_dim = q.shape
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if backend.exporting():
        # Of every device; the log-sum-exp stays in no graph that doesn't read it.
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        _, log_sum_exp = _explicit(q, k, v, scale)
    elif q.numel() == 0 or k.numel() == 0 or _math_is_asked_for(q):
        out, log_sum_exp = _explicit(q, k, v, scale)
    elif q.device.type == "cpu":
        out, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif q.is_cuda and q.dtype is not torch.float64:
        out, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
        log_sum_exp = log_sum_exp[..., :tokens]
    else:
        out, log_sum_exp = _explicit(q, k, v, scale)
    log_sum_exp = as_dtype(log_sum_exp, log_sum_exp_dtype(q)).contiguous()
    # Laid out as q in PyTorch's operators.
    return out.transpose(1, 2).reshape(batch, tokens, heads * head_dim).contiguous(), log_sum_exp


def _math_is_asked_for(q: Tensor) -> bool:
    """Whether `torch.nn.attention.sdpa_kernel` leaves the plain formula alone, which has every derivative."""
    return _only_math_is_allowed(on_cpu=q.device.type == "cpu")


# Dynamo asks once, as it traces, and so does stock attention.
@torch.compiler.assume_constant_result
def _only_math_is_allowed(on_cpu: bool) -> bool:
    sdp = torch.backends.cuda
    return sdp.math_sdp_enabled() and not (sdp.flash_sdp_enabled() if on_cpu else sdp.mem_efficient_sdp_enabled())


def _explicit(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    scores = (q @ k.transpose(-2, -1)) * scale
    return scores.softmax(dim=-1) @ v, scores.logsumexp(dim=-1)


def _gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    explicit: bool = False,
) -> list[Tensor]:
    batch, tokens, heads, head_dim = q.shape
    if q.numel() == 0 or k.numel() == 0:
        return [torch.zeros_like(t) for t in (q, k, v)]
    dtype, wide = q.dtype, product_dtype(q)
    grad, out = (t.view(batch, tokens, heads, head_dim) for t in (grad.contiguous(), out))
    grad, q, k, v, out = (as_dtype(t, wide).transpose(1, 2) for t in (grad, q, k, v, out))
    if q.device.type == "cpu" and not explicit and not backend.exporting():
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, log_sum_exp, 0.0, False, scale=scale
        )
    else:
        found = _explicit_gradients(grad, q, k, v, out, log_sum_exp, scale)
    return [as_dtype(t, dtype).transpose(1, 2) for t in found]


def _explicit_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = Pᵀ dO, dS = P (dO Vᵀ − rowsum(dO O)), dQ = scale dS K, dK = scale dSᵀ Q."""
    weights = torch.exp((q @ k.mT).mul(scale) - log_sum_exp.unsqueeze(-1)).to(q.dtype)
    delta = (grad * out).sum(-1, keepdim=True)
    of_scores = weights * (grad @ v.mT - delta) * scale
    return of_scores @ k, of_scores.mT @ q, weights.mT @ grad


def _unsupported(qkv: Sequence[Tensor], scale: float, *others: Tensor) -> str | None:
    return kernels.unsupported(qkv[0].shape[-1], scale, qkv[0]) or checks.kernel_products(qkv[0], *others)


def _flops(qkv: Sequence[Tensor], kept: Tensor | None, products: int) -> int:
    """Of so many products of the tokens with the tokens."""
    q, k, *_ = kernels.separate(qkv)
    return 2 * products * samples_computed(q, kept) * q[:1].numel() * k.shape[1] if q.numel() else 0


def _as_given(gradients: list[Tensor], qkv: list[Tensor]) -> list[Tensor]:
    """Those of q, k and v, packed as `qkv` is and with its room."""
    found = [torch.stack(gradients, dim=2)] if len(qkv) == 1 else gradients
    return [drop_path.with_room(t.contiguous(), qkv[0].shape[0]) for t in found]


class _AttentionBackward(BackwardOperator):
    """Returns the gradients of all of qkv, in one tensor or three."""

    name = "attention_backward"
    launcher = staticmethod(kernels.attention_backward)

    @staticmethod
    def stock(
        grad: PerSample,
        qkv: list[PerSample],
        out: PerSample,
        log_sum_exp: PerSample,
        scale: float,
        kept: Shared | None,
    ) -> list[Tensor]:
        grad, out, log_sum_exp = (drop_path.filled(t, kept) for t in (grad, out, log_sum_exp))
        q, k, v = kernels.separate([drop_path.filled(t, kept) for t in qkv])
        return _as_given(_gradients(grad, q, k, v, out, log_sum_exp, scale), qkv)

    def differentiable(
        self, grad: Tensor, qkv: list[Tensor], out: Tensor, log_sum_exp: Tensor, scale: float, kept: Tensor | None
    ) -> list[Tensor]:
        q, k, v = kernels.separate([drop_path.filled(t, kept) for t in qkv])
        out, log_sum_exp = _explicit(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
        out, log_sum_exp = out.transpose(1, 2).flatten(2), log_sum_exp.to(log_sum_exp_dtype(q))
        grad = drop_path.filled(grad, kept)
        return _as_given(_gradients(grad, q, k, v, out, log_sum_exp, scale, explicit=True), qkv)

    def unsupported(self, a: Any) -> str | None:
        return _unsupported(a.qkv, a.scale, a.grad)

    def fake(self, a: Any) -> list[Tensor]:
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in a.qkv]

    def flops(self, a: Any) -> int:
        # The kernels find the scores and their gradients twice: for the queries' gradient, and for the keys' and
        # values'.
        return _flops(a.qkv, a.kept, 7 if backend.use_triton(a.grad) else 5)


attention_backward = _AttentionBackward()


class _Attention(Operator):
    name = "attention"
    launcher = staticmethod(kernels.attention)
    casts = ("qkv",)
    saves = ("qkv", "kept")
    saves_outputs = (0, 1)
    data = ("kept",)
    data_outputs = (1,)

    @staticmethod
    def stock(qkv: list[PerSample], scale: float, kept: Shared | None) -> tuple[Tensor, Tensor]:
        q, k, v = kernels.separate([drop_path.filled(t, kept) for t in qkv])
        out, log_sum_exp = _attend(q, k, v, scale)
        return drop_path.with_room(out, qkv[0].shape[0]), drop_path.with_room(log_sum_exp, qkv[0].shape[0])

    def check(self, a: Any) -> None:
        for tensor in a.qkv:
            checks.floating(self.name, "qkv", tensor)
        if len(a.qkv) == 1:
            self._check_packed(*a.qkv)
        elif len(a.qkv) == 3:
            self._check_separate(*a.qkv)
        else:
            raise ValueError(
                f"deit_fast.attention: qkv must be one packed tensor or three (q, k, v), got {len(a.qkv)} tensors"
            )
        drop_path.check_packed(self.name, a.qkv[0], a.kept)

    def _check_packed(self, qkv: Tensor) -> None:
        if qkv.ndim != 5 or qkv.shape[2] != 3:
            raise ValueError(
                f"deit_fast.attention: qkv must have shape [batch, tokens, 3, heads, head_dim], got {tuple(qkv.shape)}"
            )

    def _check_separate(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:1] + q.shape[2:] != k.shape[:1] + k.shape[2:]:
            raise ValueError(
                f"deit_fast.attention: q, k and v must have shape [batch, tokens, heads, head_dim], k and v the same, "
                f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
            )
        if not q.dtype == k.dtype == v.dtype:
            raise TypeError(f"deit_fast.attention: q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
        checks.same_device(self.name, q, k=k, v=v)

    def unsupported(self, a: Any) -> str | None:
        return _unsupported(a.qkv, a.scale)

    def fake(self, a: Any) -> tuple[Tensor, Tensor]:
        q = a.qkv[0]
        batch, tokens, heads, head_dim = q.shape[0], q.shape[1], q.shape[-2], q.shape[-1]
        return (
            q.new_empty((batch, tokens, heads * head_dim)),
            q.new_empty((batch, heads, tokens), dtype=log_sum_exp_dtype(q)),
        )

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        out, log_sum_exp = outputs
        return attention_backward(grads[0], a.qkv, out, log_sum_exp, a.scale, a.kept)

    def flops(self, a: Any) -> int:
        return _flops(a.qkv, a.kept, 2)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        head = (size.heads, size.head_dim)
        packed = new.normal(size.batch, size.tokens, 3, *head)
        yield Example("", {"qkv": [packed], "scale": size.scale, "kept": None})
        separate = [new.normal(size.batch, size.tokens, *head) for _ in range(3)]
        yield Example("separate q, k, v", {"qkv": separate, "scale": size.scale, "kept": None})


softmax_attention = _Attention()


def attention(qkv: Sequence[Tensor], scale: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`softmax(scale * q kᵀ) v`.

    qkv: one packed tensor [B, N, 3, H, d], or q [B, N, H, d] and k, v [B, M, H, d]; of any strides.

    Returns the output [B, N, H·d] and the log-sum-exp of the scaled scores [B, H, N], float32
    (float64 for float64 inputs), which has no gradient.
    Kernels for d = 32, 64, 80, 96, 128; other head widths use the stock operator.
    With `kept` (`keep_samples`) for the kept samples alone: everything is packed.
    """
    return softmax_attention(qkv, scale, kept)


def attend(projected: Sequence[Tensor], heads: int, softmax_scale: float, kept: Tensor | None = None) -> Tensor:
    """Attention before the output projection, from packed qkv [B, N, 3·H·d] or from q, k, v [B, N, H·d].

    Returns [B, N, H·d]; with `kept`, packed as `projected` is.
    """
    return attention(by_head(projected, heads), softmax_scale, kept)[0]


def by_head(projected: Sequence[Tensor], heads: int) -> list[Tensor]:
    """Projections as `attention` takes them."""
    batch, tokens, width = projected[0].shape
    if len(projected) == 1:
        return [projected[0].view(batch, tokens, 3, heads, width // (3 * heads))]
    return [each.view(batch, tokens, heads, width // heads) for each in projected]
