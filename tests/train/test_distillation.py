import copy
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from deit_fast.ops import backend
from deit_fast.ops import loss as ops
from deit_fast.train import DistillationLoss
from reference.loss import cross_entropy, log_softmax

BATCH, CLASSES = 5, 10
BACKENDS = ("triton", "torch")
everywhere = pytest.mark.parametrize("chosen", BACKENDS)


class Teacher(nn.Module):
    """Gives one answer, and remembers how it was asked."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.asked = []
        self.eval()

    def forward(self, inputs):
        self.asked.append((inputs, self.training, torch.is_grad_enabled()))
        return self.logits


def original(base_loss, dist_logits, teacher_logits, distillation_type, alpha, tau):
    """The formula of the original repository's losses.py, in sums written out."""
    rows, classes = dist_logits.shape
    if distillation_type == "none":
        return base_loss
    total = 0.0
    for student, teacher in zip(dist_logits, teacher_logits, strict=True):
        if distillation_type == "soft":
            student, teacher = log_softmax(student / tau), log_softmax(teacher / tau)
            total += (teacher.exp() * (teacher - student)).sum() * tau * tau / (rows * classes)
        else:
            total += -log_softmax(student)[teacher.argmax()] / rows
    return (1 - alpha) * base_loss + alpha * total


def bce(logits, targets):
    p = logits.sigmoid()
    return -(targets * p.log() + (1 - targets) * (1 - p).log()).mean()


def criteria():
    """name: (criterion, its labels, the same in float64, whether the fused operator computes it)."""
    from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    labels = torch.tensor([1, 0, 9, 3, 3])
    ignored = torch.tensor([1, -100, 9, 3, -100])
    mixup = torch.full((BATCH, CLASSES), 0.01).scatter(1, labels[:, None], 0.6).scatter(1, labels.flip(0)[:, None], 0.3)
    weight = torch.rand(CLASSES)
    return {
        "cross-entropy": (nn.CrossEntropyLoss(), labels, cross_entropy, True),
        "ignored labels": (nn.CrossEntropyLoss(), ignored, lambda x, y: cross_entropy(x, y, 0.0, -100), True),
        "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), labels, lambda x, y: cross_entropy(x, y, 0.1), True),
        "mixup": (nn.CrossEntropyLoss(label_smoothing=0.1), mixup, lambda x, y: cross_entropy(x, y, 0.1), True),
        "timm smoothed": (LabelSmoothingCrossEntropy(0.2), labels, lambda x, y: cross_entropy(x, y, 0.2), True),
        "timm mixup": (SoftTargetCrossEntropy(), mixup, cross_entropy, True),
        "bce": (nn.BCEWithLogitsLoss(), mixup, bce, False),
        "timm bce": (BinaryCrossEntropy(0.0, target_threshold=0.2), mixup, lambda x, y: bce(x, 1.0 * (y > 0.2)), False),
        "weighted": (
            nn.CrossEntropyLoss(weight),
            labels,
            lambda x, y: nn.functional.cross_entropy(x, y, weight.double()),
            False,
        ),
    }


def heads(dtype=torch.float32):
    return [torch.randn(BATCH, CLASSES).mul(3).to(dtype).requires_grad_() for _ in range(2)]


@everywhere
@pytest.mark.parametrize("distillation_type", ["none", "soft", "hard"])
@pytest.mark.parametrize("name", criteria())
def test_loss_and_gradients_are_the_original_formulas(name, distillation_type, chosen):
    criterion, labels, exact_criterion, fused = criteria()[name]
    logits, dist_logits = heads()
    teacher = Teacher(torch.randn(BATCH, CLASSES) * 3)
    loss_function = DistillationLoss(criterion, teacher, distillation_type, alpha=0.3, tau=3.0)
    with (
        backend.forced(chosen),
        mock.patch.object(ops, "distillation_loss", wraps=ops.distillation_loss) as operator,
    ):
        loss = loss_function(torch.zeros(BATCH), (logits, dist_logits), labels)
    assert operator.called == (fused and distillation_type != "none")
    loss.backward()

    exact = [head.detach().double().requires_grad_() for head in (logits, dist_logits)]
    exact_labels = labels.double() if labels.is_floating_point() else labels
    base = exact_criterion(exact[0], exact_labels)
    expected = original(base, exact[1], teacher.logits.detach().double(), distillation_type, 0.3, 3.0)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), exact[0].grad, rtol=1e-5, atol=1e-7)
    if distillation_type == "none":
        assert dist_logits.grad is None
    else:
        torch.testing.assert_close(dist_logits.grad.double(), exact[1].grad, rtol=1e-5, atol=1e-7)
    assert teacher.logits.grad is None


@pytest.mark.parametrize("distillation_type", ["soft", "hard"])
def test_the_teacher_is_in_evaluation_mode_without_gradients_and_it_is_said(distillation_type):
    teacher = Teacher(torch.randn(BATCH, CLASSES)).train()
    with pytest.warns(UserWarning, match="the teacher was in training mode"):
        loss_function = DistillationLoss(nn.CrossEntropyLoss(), teacher, distillation_type, 0.5, 1.0)
    loss_function.train()
    images = torch.randn(BATCH, 3)
    loss_function(images, heads(), torch.zeros(BATCH, dtype=torch.int64))
    assert loss_function.training
    [(inputs, training, gradients)] = teacher.asked
    assert inputs is images
    assert not training
    assert not gradients


def test_a_teacher_may_be_under_data_parallel():
    teacher, outputs, labels = nn.Linear(3, CLASSES).eval(), heads(), torch.arange(BATCH)
    losses = [
        DistillationLoss(nn.CrossEntropyLoss(), given, "soft", 0.5, 2.0)(torch.ones(BATCH, 3), outputs, labels)
        for given in (teacher, nn.DataParallel(teacher).eval())
    ]
    assert torch.equal(*losses)


def test_without_distillation_nobody_asks_a_teacher():
    teacher = Teacher(torch.randn(BATCH, CLASSES))
    labels = torch.zeros(BATCH, dtype=torch.int64)
    logits, dist_logits = heads()
    for loss_function in (
        DistillationLoss(nn.CrossEntropyLoss(), teacher, "none", 0.5, 1.0),
        DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0),
    ):
        expected = nn.functional.cross_entropy(logits, labels)
        assert loss_function(None, logits, labels) == loss_function(None, (logits, dist_logits), labels) == expected
    assert not teacher.asked


def test_outputs_of_transformers_and_a_transformers_teacher():
    from transformers.modeling_outputs import ImageClassifierOutput
    from transformers.models.deit.modeling_deit import DeiTForImageClassificationWithTeacherOutput

    logits, dist_logits = heads()
    labels = torch.arange(BATCH)
    teacher_logits = torch.randn(BATCH, CLASSES)

    class TransformersTeacher(nn.Module):
        def forward(self, pixel_values):
            return ImageClassifierOutput(logits=teacher_logits)

    outputs = DeiTForImageClassificationWithTeacherOutput(
        logits=(logits + dist_logits) / 2, cls_logits=logits, distillation_logits=dist_logits
    )
    teacher = TransformersTeacher().eval()
    loss = DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 2.0)(None, outputs, labels)
    as_pair = DistillationLoss(nn.CrossEntropyLoss(), Teacher(teacher_logits), "soft", 0.5, 2.0)
    assert torch.equal(loss, as_pair(None, (logits, dist_logits), labels))
    single = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 2.0)
    assert torch.equal(single(None, ImageClassifierOutput(logits=logits), labels), single(None, logits, labels))


def test_a_criterion_of_the_users_own_is_called_whatever_its_name():
    class LabelSmoothingCrossEntropy(nn.Module):
        smoothing = 0.1

        def forward(self, logits, labels):
            return logits.square().mean()

    class Subclass(nn.CrossEntropyLoss):
        def forward(self, logits, labels):
            return logits.square().mean()

    hooked = nn.CrossEntropyLoss()
    hooked.register_forward_hook(lambda module, arguments, result: arguments[0].square().mean())
    logits, dist_logits = heads()
    labels = torch.zeros(BATCH, dtype=torch.int64)
    for criterion in (LabelSmoothingCrossEntropy(), Subclass(), hooked):
        loss = DistillationLoss(criterion, Teacher(dist_logits.detach()), "soft", 0.25, 1.0)
        torch.testing.assert_close(loss(None, (logits, dist_logits), labels), 0.75 * logits.square().mean())


@everywhere
@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(torch.ones(CLASSES))])
@pytest.mark.parametrize("distillation_type", ["soft", "hard"])
def test_float16_logits_of_ten_thousand(distillation_type, criterion, chosen):
    """Fused, and beside a base criterion that is not."""
    logits, dist_logits, teacher_logits = (
        (1e4 * (torch.randint(2, (BATCH, CLASSES)) * 2 - 1)).half().requires_grad_() for _ in range(3)
    )
    loss = DistillationLoss(criterion, Teacher(teacher_logits.detach()), distillation_type, 0.5, 1.0)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16):
        value = loss(None, (logits, dist_logits), labels)
    value.backward()
    doubles = [t.detach().double() for t in (logits, dist_logits, teacher_logits)]
    expected = original(cross_entropy(doubles[0], labels), *doubles[1:], distillation_type, 0.5, 1.0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    assert logits.grad.isfinite().all()
    assert dist_logits.grad.isfinite().all()


def test_accumulated_over_two_steps_the_gradients_add_up():
    logits, dist_logits = heads()
    labels = torch.arange(BATCH)
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher(torch.randn(BATCH, CLASSES)), "soft", 0.5, 2.0)
    with backend.forced("triton"):
        loss(None, (logits, dist_logits), labels).backward()
        once = logits.grad.clone()
        (loss(None, (logits, dist_logits), labels) * 0.5).backward()
    torch.testing.assert_close(logits.grad, 1.5 * once)


def test_copies_and_compiles():
    logits, dist_logits = heads()
    labels = torch.arange(BATCH)
    loss = DistillationLoss(nn.CrossEntropyLoss(), nn.Linear(3, CLASSES).eval(), "hard", 0.5, 2.0)
    images = torch.randn(BATCH, 3)
    expected = loss(images, (logits, dist_logits), labels)
    assert torch.equal(copy.deepcopy(loss)(images, (logits, dist_logits), labels), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, (logits, dist_logits), labels), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distillation_type": "medium"}, r"one of \('none', 'soft', 'hard'\), got 'medium'"),
        ({"alpha": -0.1}, r"alpha, .* between 0 and 1, got -0.1"),
        ({"alpha": 1.1}, r"alpha, .* between 0 and 1, got 1.1"),
        ({"tau": 0.0}, r"tau, .* positive, got 0.0"),
        ({"tau": math.nan}, r"tau, .* positive, got nan"),
        ({"teacher_model": None}, r"distillation_type='soft' needs a teacher_model, got None"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction(change, message):
    settings = {
        "base_criterion": nn.CrossEntropyLoss(),
        "teacher_model": nn.Identity().eval(),
        "distillation_type": "soft",
        "alpha": 0.5,
        "tau": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**settings | change)


@pytest.mark.parametrize("distillation_type", ["soft", "hard"])
def test_one_head_is_refused_and_the_distilled_model_named(distillation_type):
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher(torch.randn(BATCH, CLASSES)), distillation_type, 0.5, 1.0)
    outputs = torch.randn(BATCH, CLASSES)
    for single in (outputs, SimpleNamespace(logits=outputs)):
        with pytest.raises(ValueError, match=r"the model returned one\. Use .*'deit_tiny_distilled_patch16_224'"):
            loss(None, single, torch.arange(BATCH))


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()])  # fused, and not
def test_a_teacher_of_other_classes_is_refused(criterion):
    loss = DistillationLoss(criterion, Teacher(torch.randn(BATCH, 21)), "hard", 0.5, 1.0)
    message = rf"shape \[{BATCH}, 21\], .* \[{BATCH}, 10\]: use a teacher with the student's 10 classes"
    with pytest.raises(ValueError, match=message):
        loss(None, heads(), torch.zeros(BATCH, CLASSES))


def test_a_teacher_without_logits_is_refused():
    class TwoHeads(nn.Module):
        def forward(self, inputs):
            return torch.ones(BATCH, CLASSES), torch.ones(BATCH, CLASSES)

    loss = DistillationLoss(nn.BCEWithLogitsLoss(), TwoHeads().eval(), "hard", 0.5, 1.0)
    with pytest.raises(TypeError, match=r"tensor or an object with .logits, got tuple"):
        loss(None, heads(), torch.zeros(BATCH, CLASSES))


def test_outputs_of_another_kind_are_refused():
    loss = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    with pytest.raises(TypeError, match=r"outputs must be logits, .* got tuple of 3"):
        loss(None, (torch.ones(1), torch.ones(1), torch.ones(1)), None)


@everywhere
@pytest.mark.parametrize("distillation_type", ["none", "soft", "hard"])
@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_labels_out_of_range_are_refused(wrong, distillation_type, chosen):
    loss = DistillationLoss(nn.CrossEntropyLoss(), Teacher(torch.randn(BATCH, CLASSES)), distillation_type, 0.5, 1.0)
    labels = torch.zeros(BATCH, dtype=torch.int64)
    labels[2] = wrong
    with backend.forced(chosen), pytest.raises(ValueError, match=f"between 0 and 9 .*, got {wrong} at index 2"):
        loss(None, heads(), labels)


def test_labels_of_the_other_kind_are_refused():
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    soft = DistillationLoss(SoftTargetCrossEntropy(), None, "none", 0.5, 1.0)
    with pytest.raises(ValueError, match=r"SoftTargetCrossEntropy takes soft targets .* nn.CrossEntropyLoss"):
        soft(None, torch.ones(CLASSES, CLASSES), torch.arange(CLASSES))
    smoothed = DistillationLoss(LabelSmoothingCrossEntropy(), None, "none", 0.5, 1.0)
    with pytest.raises(ValueError, match=r"LabelSmoothingCrossEntropy takes class labels .* SoftTargetCrossEntropy"):
        smoothed(None, torch.ones(BATCH, CLASSES), torch.ones(BATCH, CLASSES))
