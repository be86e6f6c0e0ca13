from unittest import mock

import pytest
import torch

from deit_fast.kernels.launching import run
from deit_fast.kernels.loss import distillation_loss, loss_row
from tests.support.guard import Guard

BOTH = [True, True]


def arguments_of(batch=4, classes=10, dtype=torch.float32):
    logits, dist_logits, teacher_logits = (torch.randn(batch, classes).to(dtype) for _ in range(3))
    return logits, dist_logits, torch.randint(classes, (batch,)), teacher_logits


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_one_launch_and_the_same_bits_every_run(kind):
    arguments = (*arguments_of(), kind, 0.5, 3.0, 0.1, -100, BOTH)
    with mock.patch.object(run, "run", wraps=run.run) as launch:
        first = distillation_loss(*arguments)
    assert launch.call_count == 1
    for once, twice in zip(first, distillation_loss(*arguments), strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize("needs", [[False, False], [True, False], [False, True]])
def test_only_the_gradients_asked_for_are_written(needs):
    arguments = (*arguments_of(), "soft", 0.5, 3.0, 0.1, None)
    loss, *gradients = distillation_loss(*arguments, needs)
    all_of_it, *all_gradients = distillation_loss(*arguments, BOTH)
    assert torch.equal(loss, all_of_it)
    for gradient, full, need in zip(gradients, all_gradients, needs, strict=True):
        assert torch.equal(gradient, full) if need else gradient.shape == (0,)


@pytest.mark.parametrize("label", [-1, 10, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan_and_touches_nothing_else(label):
    """What a GPU answers, where looking at the labels first would wait for it."""
    logits, dist_logits, labels, teacher_logits = arguments_of()
    labels[2] = label
    guard = Guard()
    tensors = [guard(t) for t in (logits, dist_logits, labels, teacher_logits)]
    with guard.outputs():
        loss, grad, dist_grad = distillation_loss(*tensors, "hard", 0.5, 1.0, 0.0, -100, BOTH)
    guard.assert_untouched()
    assert loss.isnan()
    assert grad.isnan().any(dim=1).tolist() == [False, False, True, False]
    assert dist_grad.isfinite().all()


@pytest.mark.parametrize("classes", [10, 5000])
def test_the_teachers_class_is_the_one_that_argmax_finds(classes):
    """The first of equals, also across blocks; NaN above all."""
    logits, dist_logits, labels, teacher_logits = arguments_of(6, classes)
    teacher_logits[0] = 0.0
    teacher_logits[1, [3, classes - 1]] = 100.0
    teacher_logits[2] = -torch.inf
    teacher_logits[3, 7], teacher_logits[3, 2] = torch.nan, torch.inf
    teacher_logits[4, classes - 1] = torch.inf
    _, _, gradient = distillation_loss(logits, dist_logits, labels, teacher_logits, "hard", 1.0, 1.0, 0.0, None, BOTH)
    expected = teacher_logits.argmax(dim=1)
    expected[3] = 2  # infinity and NaN are one here
    assert torch.equal(gradient.argmin(dim=1), expected)


@pytest.mark.parametrize("classes", [2, 10, 1000, 21841])
def test_a_program_holds_at_most_eight_elements_a_thread(classes):
    block, warps = loss_row(classes)
    assert block >= min(classes, 2048)
    assert block <= 8 * 32 * warps
