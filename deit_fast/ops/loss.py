"""The distillation loss over two heads, cross-entropy being the base criterion; its gradients come with it."""

import warnings
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Module

from deit_fast.kernels import loss as kernels
from deit_fast.ops import checks
from deit_fast.ops.arguments import FreeInt, PerSample
from deit_fast.ops.examples import Example, Inputs, Size
from deit_fast.ops.operator import Operator, distribute

_OP = "distillation_loss"
# How `F.cross_entropy` marks labels to leave out.
_IGNORED = -100


def check_labels(labels: Tensor, classes: int, ignore_index: int | None) -> None:
    """Raises where a label on the CPU is no class. On a GPU this would wait for it: the kernel answers with NaN."""
    if labels.device.type != "cpu" or isinstance(labels, FakeTensor) or torch.compiler.is_compiling():
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


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def check_weights(alpha: float, tau: float) -> None:
    """Of a loss that is made once and called often: raises ValueError before the first call."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha, the weight of the distillation loss, must lie between 0 and 1, got {alpha}")
    if not tau > 0:
        raise ValueError(f"tau, the temperature, must be positive, got {tau}")


def evaluating(teacher: Module) -> None:
    """Puts a teacher into evaluation mode, and says so if it was not: its batch statistics would have moved."""
    if teacher.training:
        warnings.warn("the teacher was in training mode, and is put into evaluation mode", stacklevel=3)
        teacher.eval()


def stock_distillation(dist_logits: Tensor, teacher_logits: Tensor, distillation_type: str, tau: float) -> Tensor:
    """The distillation term of `distillation_loss` in stock PyTorch, in float32 at least: a float16 sum overflows."""
    dtype = _compute_dtype(dist_logits)
    dist_logits, teacher_logits = dist_logits.to(dtype), teacher_logits.to(dtype)
    if distillation_type == "hard":
        return F.cross_entropy(dist_logits, teacher_logits.argmax(dim=1))
    student, teacher = F.log_softmax(dist_logits / tau, dim=1), F.log_softmax(teacher_logits / tau, dim=1)
    # The mean over all elements; unlike sum / numel it is also defined, as NaN, where there are none.
    return F.kl_div(student, teacher, reduction="none", log_target=True).mean() * tau**2


def _mean_targets(targets: Tensor, classes: int, label_smoothing: float, dtype: torch.dtype) -> Tensor:
    """q [B, C] such that cross-entropy, averaged over the rows that are not ignored, is -Σ q log p."""
    if targets.is_floating_point():
        return ((1 - label_smoothing) * targets + label_smoothing / classes) / max(targets.shape[0], 1)
    kept = targets != _IGNORED
    one_hot = F.one_hot(targets * kept, classes).to(dtype)
    return ((1 - label_smoothing) * one_hot + label_smoothing / classes) * kept[:, None] / kept.sum().clamp(min=1)


def _gradient(logits: Tensor, q: Tensor) -> Tensor:
    """Of -Σ q log softmax(logits)."""
    log_p = F.log_softmax(logits.detach(), dim=1)
    return torch.ops.aten._log_softmax_backward_data(-q, log_p, 1, log_p.dtype)


class _DistillationLoss(Operator):
    """Returns the gradients of the two heads with the loss, float32, empty where they are not needed."""

    name = _OP
    launcher = staticmethod(kernels.distillation_loss)
    # Read where gradients are to have gradients.
    saves = ("logits", "dist_logits", "targets", "teacher_logits")
    saves_outputs = (1, 2)
    data = ("targets", "teacher_logits")
    data_outputs = (1, 2)

    @staticmethod
    def stock(
        logits: PerSample,
        dist_logits: PerSample,
        targets: PerSample,
        teacher_logits: PerSample,
        distillation_type: str,
        alpha: float,
        tau: float,
        label_smoothing: float,
        ignore_index: FreeInt | None,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = _compute_dtype(logits)
        logits, dist_logits, teacher_logits = logits.to(dtype), dist_logits.to(dtype), teacher_logits.to(dtype)
        if targets.is_floating_point():
            targets = targets.to(dtype)
            base = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
        else:
            ignored = torch.zeros_like(targets, dtype=torch.bool) if ignore_index is None else targets == ignore_index
            targets = targets.long().masked_fill(ignored, _IGNORED)
            base = F.cross_entropy(logits, targets, ignore_index=_IGNORED, label_smoothing=label_smoothing)
        distillation = stock_distillation(dist_logits, teacher_logits, distillation_type, tau)
        gradients = [logits.new_empty(0), logits.new_empty(0)]
        if needs[0]:
            q = (1 - alpha) * _mean_targets(targets, logits.shape[1], label_smoothing, dtype)
            gradients[0] = _gradient(logits, q)
        if needs[1] and distillation_type == "soft":
            q = alpha * tau / max(dist_logits.numel(), 1) * F.softmax(teacher_logits / tau, dim=1)
            gradients[1] = _gradient(dist_logits / tau, q)
        elif needs[1]:
            classes = teacher_logits.argmax(dim=1)
            gradients[1] = _gradient(dist_logits, alpha * _mean_targets(classes, logits.shape[1], 0.0, dtype))
        return (1 - alpha) * base + alpha * distillation, gradients[0], gradients[1]

    def check(self, a: Any) -> None:
        _check(*a)

    def unsupported(self, a: Any) -> str | None:
        soft_targets = a.targets if a.targets.is_floating_point() else None
        return checks.kernel_dtypes(a.logits, a.dist_logits, soft_targets, a.teacher_logits)

    def fake(self, a: Any) -> tuple[Tensor, Tensor, Tensor]:
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=_compute_dtype(a.logits), device=a.logits.device)

        need_logits, need_dist_logits = a.needs
        shape = a.logits.shape
        return empty(), empty(*shape if need_logits else (0,)), empty(*shape if need_dist_logits else (0,))

    def backward(
        self, a: Any, outputs: Sequence[Tensor], grads: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        grad_loss, *_ = grads
        if grad_loss is None:
            return None, None
        if torch.is_grad_enabled():
            return self._differentiable_gradients(a, grad_loss, needs)
        # The saved gradients are float32 and autograd rounds them only after this, so that a loss scale keeps small
        # ones from vanishing.
        return [saved * grad_loss if need else None for saved, need in zip(outputs, needs, strict=True)]

    def _differentiable_gradients(self, a: Any, grad_loss: Tensor, needs: Sequence[bool]) -> Sequence[Tensor | None]:
        """Those of the stock form, computed again: `create_graph=True` asks for a graph of them."""
        # Of their own, so that no way from one head to the other is counted.
        heads = a.logits.view_as(a.logits), a.dist_logits.view_as(a.dist_logits)
        loss, *_ = self.stock(*a._replace(logits=heads[0], dist_logits=heads[1], needs=[False, False]))
        wanted = [head for head, need in zip(heads, needs, strict=True) if need]
        return distribute(list(torch.autograd.grad(loss, wanted, grad_loss, create_graph=True)), needs)

    def examples(self, size: Size, new: Inputs) -> Iterator[Example]:
        names = ("logits", "dist_logits", "teacher_logits")
        labels = new.integers(size.batch, below=size.classes, dtype=torch.int64)
        for kind, tau in (("hard", 1.0), ("soft", 3.0)):
            logits = {name: new.normal(size.batch, size.classes) for name in names}
            options = {"distillation_type": kind, "alpha": 0.5, "tau": tau, "label_smoothing": 0.1}
            rest = {"ignore_index": None, "needs": [True, True]}
            yield Example(kind, {**logits, "targets": labels, **options, **rest})


_distillation_loss = _DistillationLoss()


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
    Gradients for the two heads only; their own gradients are the stock formula's.

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
