"""The distillation loss over two heads, cross-entropy being the base criterion; its gradients come with it."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from deit_fast.kernels import loss as kernels
from deit_fast.ops import checks
from deit_fast.ops.registration import register

_OP = "distillation_loss"


def check_labels(labels: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises where a label on the CPU is no class. On a GPU this would wait for it: the kernel answers with NaN."""
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor):
        return
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        raise ValueError(
            f"deit_fast.{_OP}: labels must lie between 0 and {classes - 1} (the logits have {classes} classes), "
            f"got {labels[wrong][0].item()} at index {wrong.nonzero()[0].item()}"
        )


def _check(
    logits: Tensor,
    dist_logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    distillation_type: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    ignore_index: int | None,
    needs: list[bool],
) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"deit_fast.{_OP}: logits must have shape [batch, classes], got {list(logits.shape)}")
    if dist_logits.shape != logits.shape:
        raise ValueError(
            f"deit_fast.{_OP}: the two heads must have one shape, got {list(logits.shape)} and "
            f"{list(dist_logits.shape)}"
        )
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"deit_fast.{_OP}: the teacher's logits must have the student's shape {list(logits.shape)}, "
            f"got {list(teacher_logits.shape)}; use a teacher trained on the same classes"
        )
    for name, tensor in (("logits", logits), ("dist_logits", dist_logits), ("teacher_logits", teacher_logits)):
        checks.floating(_OP, name, tensor)
    checks.same_device(_OP, logits, dist_logits=dist_logits, targets=targets, teacher_logits=teacher_logits)
    expected = logits.shape if targets.is_floating_point() else logits.shape[:1]
    if targets.shape != expected:
        raise ValueError(
            f"deit_fast.{_OP}: targets must be labels [{logits.shape[0]}] of an integer dtype or soft targets "
            f"{list(logits.shape)} of a floating one, got {list(targets.shape)} of {targets.dtype}"
        )
    if distillation_type not in ("soft", "hard"):
        raise ValueError(f"deit_fast.{_OP}: distillation_type must be 'soft' or 'hard', got {distillation_type!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"deit_fast.{_OP}: alpha must lie between 0 and 1, got {alpha}")
    if not tau > 0:
        raise ValueError(f"deit_fast.{_OP}: tau must be positive, got {tau}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"deit_fast.{_OP}: label_smoothing must lie between 0 and 1, got {label_smoothing}")
    if not targets.is_floating_point():
        check_labels(targets, logits.shape[1], ignore_index)


def _unsupported(logits, dist_logits, targets, teacher_logits, *_) -> str | None:
    soft_targets = targets if targets.is_floating_point() else None
    return checks.kernel_dtypes(logits, dist_logits, soft_targets, teacher_logits)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _stock(
    logits: Tensor,
    dist_logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    distillation_type: str,
    alpha: float,
    tau: float,
    label_smoothing: float,
    ignore_index: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _compute_dtype(logits)
    logits, dist_logits, teacher_logits = logits.to(dtype), dist_logits.to(dtype), teacher_logits.to(dtype)
    batch, classes = logits.shape
    if targets.is_floating_point():
        targets = targets.to(dtype)
        base = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        target, row_weight = targets, 1 / max(batch, 1)
    else:
        ignored = targets == ignore_index if ignore_index is not None else torch.zeros_like(targets, dtype=torch.bool)
        labels = targets.long().masked_fill(ignored, -100)
        base = F.cross_entropy(logits, labels, ignore_index=-100, label_smoothing=label_smoothing)
        target = F.one_hot(labels.masked_fill(ignored, 0), classes).to(dtype)
        row_weight = (~ignored / (~ignored).sum().clamp(min=1)).to(dtype)[:, None]
    if distillation_type == "soft":
        student, teacher = F.log_softmax(dist_logits / tau, dim=1), F.log_softmax(teacher_logits / tau, dim=1)
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        distillation = divergence * tau**2 / dist_logits.numel() if batch else divergence * torch.nan
        dist_grad = (student.exp() - teacher.exp()) * (tau / max(dist_logits.numel(), 1))
    else:
        teacher_class = teacher_logits.argmax(dim=1)
        distillation = F.cross_entropy(dist_logits, teacher_class)
        dist_grad = (F.softmax(dist_logits, dim=1) - F.one_hot(teacher_class, classes)) / max(batch, 1)
    target = (1 - label_smoothing) * target + label_smoothing / classes
    grad = (F.softmax(logits, dim=1) * target.sum(dim=1, keepdim=True) - target) * row_weight
    loss = (1 - alpha) * base + alpha * distillation
    gradients = (((1 - alpha) * grad), alpha * dist_grad)
    return loss, *(g.detach() if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))


def _fake(logits, *arguments):
    options = {"dtype": _compute_dtype(logits), "device": logits.device}
    gradients = (torch.empty(logits.shape if need else 0, **options) for need in arguments[-1])
    return torch.empty((), **options), *gradients


def _save(ctx, arguments: tuple, outputs: tuple) -> None:
    _, *gradients = outputs
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [arguments[0].dtype, arguments[1].dtype]


def _backward(ctx, grad_loss: Tensor | None, *_) -> tuple:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"deit_fast.{_OP} has no second derivative (backward was called with create_graph=True): "
            f"write the loss in stock PyTorch for that"
        )
    heads = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    # The saved gradients are float32 and rounded only now, so that a loss scale keeps small ones from vanishing.
    gradients = [(saved * grad_loss).to(dtype) if need else None for saved, dtype, need in heads]
    return *gradients, *[None] * 8


_distillation_loss = register(
    _OP,
    "(Tensor logits, Tensor dist_logits, Tensor targets, Tensor teacher_logits, str distillation_type, float alpha, "
    "float tau, float label_smoothing, int? ignore_index, bool[2] needs) -> (Tensor, Tensor, Tensor)",
    check=_check,
    stock=_stock,
    triton=kernels.distillation_loss,
    unsupported=_unsupported,
    fake=_fake,
    # Computes in float32 whatever comes in.
    autocast=lambda dtype, *arguments: arguments,
    save=_save,
    backward=_backward,
)


def distillation_loss(
    logits: Tensor,
    dist_logits: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    distillation_type: str,
    alpha: float,
    tau: float,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Tensor:
    """`(1 - alpha) * cross_entropy(logits, targets) + alpha * distillation`, a scalar.

    "hard" distillation is the cross-entropy of `dist_logits` with the teacher's most likely class; "soft" is
    `tau**2 * KL(softmax(teacher / tau) || softmax(dist / tau))` averaged over all elements, as in the original
    repository's `losses.py`. Both means are over the batch otherwise, and NaN where it is empty.

    logits, dist_logits, teacher_logits: [B, C], floating. targets: labels [B] of an integer dtype, of which
    `ignore_index` are left out of the mean, or soft targets [B, C]. label_smoothing: as in `F.cross_entropy`.
    Computes in float32. The loss has the dtype that the stock formula would give it: that of the logits (promoted with
    soft targets' and a soft teacher's), float32 under autocast.
    Gradients for the two heads only; second derivatives raise NotImplementedError.

    Raises:
        ValueError: shapes, alpha, tau or the type are wrong, or a label is out of range (tensors on the CPU; on a
            GPU, where looking would wait for it, such a label makes the loss NaN).
    """
    heads = (logits, dist_logits)
    needs = [torch.is_grad_enabled() and head.requires_grad for head in heads]
    loss = _distillation_loss(
        *heads, targets, teacher_logits, distillation_type, alpha, tau, label_smoothing, ignore_index, needs
    )[0]
    if torch.is_autocast_enabled(logits.device.type):
        return loss
    floats = [*heads, *([targets] if targets.is_floating_point() else [])]
    floats += [teacher_logits] if distillation_type == "soft" else []
    return loss.to(reduce(torch.promote_types, (tensor.dtype for tensor in floats)))
