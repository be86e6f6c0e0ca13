import pytest
import torch
import torch.nn.functional as F

from deit_fast.ops import backend
from deit_fast.ops.loss import distillation_loss
from reference.loss import distillation_loss as reference
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard

KINDS = ("soft", "hard")
BACKENDS = ("triton", "torch")
# Around the block sizes, and with ImageNet-21k more than one block.
CLASSES = (1, 2, 10, 16, 17, 1000, 1024, 2048, 2049)

everywhere = pytest.mark.parametrize("chosen", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
of_both_kinds = pytest.mark.parametrize("kind", KINDS)


def stock(logits, dist_logits, targets, teacher, kind, alpha, tau, label_smoothing=0.0, ignore_index=None):
    """The original formula of stock operators, in the dtype that comes in."""
    ignored = -100 if ignore_index is None else ignore_index
    base = F.cross_entropy(logits, targets, ignore_index=ignored, label_smoothing=label_smoothing)
    if kind == "hard":
        distillation = F.cross_entropy(dist_logits, teacher.argmax(dim=1))
    else:
        student, teacher = F.log_softmax(dist_logits / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
        distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) * tau**2 / dist_logits.numel()
    return base * (1 - alpha) + distillation * alpha


def loss_and_gradients(function, tensors, options, convert):
    logits, dist_logits, *others = (convert(t) if t.is_floating_point() else t for t in tensors)
    heads = logits.detach().requires_grad_(), dist_logits.detach().requires_grad_()
    loss = function(*heads, *others, *options)
    return loss.detach(), *torch.autograd.grad(loss, heads)


def assert_right(tensors, options, chosen="triton", autocast=False):
    """Loss and both gradients as accurate as those of the stock operators, in guard bands.

    autocast: as scripts run it, where the stock operators compute in float32 and round the gradients once.
    """
    dtype = tensors[0].dtype
    guard = Guard()
    banded = [guard(tensor) for tensor in tensors]
    enabled = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with backend.forced(chosen), guard.outputs(), enabled:
        ours = loss_and_gradients(distillation_loss, banded, options, lambda t: t)
    guard.assert_untouched()
    if autocast:
        loss, *gradients = loss_and_gradients(stock, tensors, options, torch.Tensor.float)
        theirs = loss, *(gradient.to(dtype) for gradient in gradients)
    else:
        theirs = loss_and_gradients(stock, tensors, options, lambda t: t)
    exact = loss_and_gradients(reference, tensors, options, torch.Tensor.double)
    for name, mine, other, truth in zip(("loss", "logits", "dist_logits"), ours, theirs, exact, strict=True):
        assert_as_accurate_as_stock(mine, other, truth, other.dtype, name=name)
    return ours


def tensors_of(batch, classes, dtype, soft_targets=False):
    targets = torch.randint(classes, (batch,))
    if soft_targets:
        targets = randn(batch, classes, dtype=torch.float32).softmax(dim=1).to(dtype)
    return [
        randn(batch, classes, dtype=dtype),
        randn(batch, classes, dtype=dtype, scale=3),
        targets,
        randn(batch, classes, dtype=dtype, scale=3),
    ]


@everywhere
@in_every_dtype
@of_both_kinds
@pytest.mark.parametrize("soft_targets", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_both_gradients(kind, soft_targets, autocast, dtype, chosen):
    for label_smoothing in (0.0, 0.1):
        options = (kind, 0.3, 3.0, label_smoothing)
        assert_right(tensors_of(5, 1000, dtype, soft_targets), options, chosen, autocast)


@in_every_dtype
@of_both_kinds
@pytest.mark.parametrize("classes", CLASSES)
def test_any_number_of_classes(classes, kind, dtype):
    assert_right(tensors_of(3, classes, dtype, kind == "soft"), (kind, 0.5, 2.0, 0.1), autocast=True)


@in_every_dtype
def test_imagenet_21k(dtype):
    assert_right(tensors_of(2, 21841, dtype), ("soft", 0.5, 2.0, 0.1), autocast=True)


@everywhere
@in_every_dtype
@pytest.mark.parametrize("soft_targets", [False, True])
def test_strided_inputs(soft_targets, dtype, chosen):
    tensors = tensors_of(4, 50, dtype, soft_targets)
    options = ("soft", 0.5, 2.0, 0.1)
    assert_right([strided(tensor) for tensor in tensors], options, chosen)
    assert_right([t.T.contiguous().T if t.ndim == 2 else t for t in tensors], options, chosen)
    two_heads = torch.stack([tensors[0], tensors[1]], dim=1)
    expanded = tensors[3][:1].expand(4, 50)
    assert_right([two_heads[:, 0], two_heads[:, 1], tensors[2], expanded], options, chosen)


@everywhere
@of_both_kinds
def test_the_mean_leaves_out_ignored_rows(kind, chosen):
    tensors = tensors_of(6, 10, torch.float32)
    tensors[2] = torch.tensor([1, -1, 3, -1, -1, 9])
    _, gradient, dist_gradient = assert_right(tensors, (kind, 0.5, 2.0, 0.1, -1), chosen)
    assert gradient.any(dim=1).tolist() == [True, False, True, False, False, True]
    assert dist_gradient.any(dim=1).all()


@everywhere
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_any_row_left_the_loss_is_nan_and_the_gradient_zero(label_smoothing, chosen):
    tensors = tensors_of(3, 10, torch.float32)
    tensors[2].fill_(-100)
    loss, gradient, _ = assert_right(tensors, ("hard", 0.5, 2.0, label_smoothing, -100), chosen)
    assert loss.isnan()
    assert not gradient.any()


@everywhere
@of_both_kinds
@pytest.mark.parametrize("soft_targets", [False, True])
def test_an_empty_batch_is_nan_as_of_the_stock_operators(soft_targets, kind, chosen):
    loss, *gradients = assert_right(tensors_of(0, 10, torch.float32, soft_targets), (kind, 0.5, 2.0), chosen)
    assert loss.isnan()
    assert all(gradient.shape == (0, 10) for gradient in gradients)


@everywhere
@in_every_dtype
@of_both_kinds
@pytest.mark.parametrize("soft_targets", [False, True])
def test_logits_of_ten_thousand_either_way(soft_targets, kind, dtype, chosen):
    tensors = tensors_of(4, 100, dtype, soft_targets)
    for i, generator in zip((0, 1, 3), range(3), strict=True):
        signs = torch.randint(2, (4, 100), generator=torch.Generator().manual_seed(generator)) * 2 - 1
        tensors[i] = (1e4 * signs + torch.randn(4, 100)).to(dtype)
    options = (kind, 0.5, 1.0, 0.1)
    assert all(t.isfinite().all() for t in assert_right(tensors, options, chosen, autocast=True))
    # Without autocast too, where the stock formula's float16 sum is infinite.
    with backend.forced(chosen):
        ours = loss_and_gradients(distillation_loss, tensors, options, lambda t: t)
    assert all(t.isfinite().all() and t.dtype == dtype for t in ours)


@everywhere
def test_a_confident_student_and_teacher_that_agree_lose_nothing(chosen):
    """Each at float16's largest number: the differences from the maximum are taken before anything is rounded."""
    logits = torch.full((2, 10), -65504.0, dtype=torch.float16)
    logits[:, 3] = 65504.0
    tensors = [logits, logits.clone(), torch.tensor([3, 3]), logits.clone()]
    for kind in KINDS:
        with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16):
            loss, *gradients = loss_and_gradients(distillation_loss, tensors, (kind, 0.5, 3.0), lambda t: t)
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)


@everywhere
@in_every_dtype
def test_minus_infinity_forbids_a_class(dtype, chosen):
    tensors = tensors_of(3, 5000, dtype)
    tensors[2][:] = torch.tensor([4000, 4001, 4999])
    tensors[0][:, :3000] = -torch.inf
    tensors[1][:, :2500] = -torch.inf
    tensors[3][:, :2500] = -torch.inf
    loss, *gradients = assert_right(tensors, ("hard", 0.5, 1.0), chosen, autocast=True)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@everywhere
@of_both_kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("head", [0, 1])
def test_nan_and_infinity_spoil_the_loss_and_their_own_row_of_the_gradient(head, value, kind, chosen):
    tensors = tensors_of(3, 10, torch.float32)
    tensors[head][1, 4] = value
    with backend.forced(chosen):
        loss, *gradients = loss_and_gradients(distillation_loss, tensors, (kind, 0.5, 1.0), lambda t: t)
    assert loss.isnan()
    assert gradients[head].isnan().all(dim=1).tolist() == [False, True, False]
    assert gradients[1 - head].isfinite().all()


@everywhere
def test_a_loss_scale_keeps_small_float16_gradients(chosen):
    """1/C of probability over a batch: far below float16's smallest number, unless scaled before it is rounded."""
    tensors = [t.half() if t.is_floating_point() else t for t in tensors_of(4, 1000, torch.float32)]
    tensors[0] = tensors[0] + 8 * (torch.arange(1000) < 10).half()
    logits = tensors[0].clone().requires_grad_()
    with backend.forced(chosen), torch.autocast("cpu", torch.bfloat16):
        loss = distillation_loss(logits, *tensors[1:], "hard", 0.999, 1.0)
    (loss * 2.0**16).backward()
    exact = tensors[0].double().requires_grad_()
    reference(exact, *[t.double() if t.is_floating_point() else t for t in tensors[1:]], "hard", 0.999, 1.0).backward()
    expected = (exact.grad * 2.0**16).half()
    torch.testing.assert_close(logits.grad, expected, rtol=2**-10, atol=6e-8)
    assert (logits.grad != 0).all()


@everywhere
def test_only_the_gradients_asked_for_are_computed(chosen):
    tensors = tensors_of(3, 10, torch.float32)
    tensors[1].requires_grad_()
    with backend.forced(chosen):
        distillation_loss(*tensors, "soft", 0.5, 1.0).backward()
        with torch.no_grad():
            assert not distillation_loss(*tensors, "soft", 0.5, 1.0).requires_grad
        outputs = torch.ops.deit_fast.distillation_loss(*tensors, "soft", 0.5, 1.0, 0.0, None, [False, True])
    assert tensors[1].grad is not None
    assert [tuple(output.shape) for output in outputs] == [(), (0,), (3, 10)]


@everywhere
@of_both_kinds
def test_a_gradient_penalty_has_stocks_gradients(kind, chosen):
    *heads, targets, teacher = tensors_of(3, 10, torch.float32)
    found = []
    for function in (distillation_loss, stock):
        leaves = [head.detach().requires_grad_() for head in heads]
        with backend.forced(chosen):
            # Of one source, as both heads are.
            loss = function(leaves[0] * leaves[1], leaves[1].sin(), targets, teacher, kind, 0.3, 2.0)
            penalty = torch.autograd.grad(loss, leaves, create_graph=True)
            (loss + sum(gradient.square().sum() for gradient in penalty)).backward()
        found.append([loss, *penalty, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found)


@everywhere
@of_both_kinds
def test_a_frozen_head_has_no_gradient_in_a_graph_of_gradients(kind, chosen):
    tensors = tensors_of(3, 10, torch.float32)
    tensors[1].requires_grad_()
    with backend.forced(chosen):
        (plain, with_graph) = (
            torch.autograd.grad(distillation_loss(*tensors, kind, 0.5, 1.0), tensors[1], create_graph=graph)[0]
            for graph in (False, True)
        )
    torch.testing.assert_close(with_graph, plain)
    assert with_graph.requires_grad


@everywhere
@of_both_kinds
def test_opcheck(kind, chosen):
    for soft_targets in (False, True):
        for requires_grad in (False, True):
            tensors = tensors_of(3, 10, torch.float32, soft_targets)
            for head in tensors[:2]:
                head.requires_grad_(requires_grad)
            arguments = (*tensors, kind, 0.5, 2.0, 0.1, None, [requires_grad, requires_grad])
            with backend.forced(chosen):
                torch.library.opcheck(torch.ops.deit_fast.distillation_loss.default, arguments)


@of_both_kinds
def test_compiles_without_a_graph_break(kind):
    tensors = tensors_of(3, 10, torch.float32)
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    options = (kind, 0.5, 2.0)
    eager = loss_and_gradients(distillation_loss, tensors, options, lambda t: t)
    for ours, expected in zip(loss_and_gradients(compiled, tensors, options, lambda t: t), eager, strict=True):
        torch.testing.assert_close(ours, expected)


@of_both_kinds
def test_functional_transforms_go_through(kind):
    tensors = tensors_of(3, 10, torch.float32)
    found = torch.func.grad(distillation_loss)(*tensors, kind, 0.5, 2.0)
    torch.testing.assert_close(found, loss_and_gradients(stock, tensors, (kind, 0.5, 2.0), lambda t: t)[1])


@in_every_dtype
def test_the_loss_has_the_dtype_of_the_stock_formula(dtype):
    tensors = tensors_of(3, 10, dtype)
    mixup = torch.rand(3, 10)
    for kind in KINDS:
        for targets in (tensors[2], mixup):
            for teacher in (tensors[3], tensors[3].float()):
                arguments = (tensors[0], tensors[1], targets, teacher, kind, 0.5, 2.0)
                assert distillation_loss(*arguments).dtype == stock(*arguments).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert distillation_loss(*tensors, "soft", 0.5, 2.0).dtype == torch.float32


def test_float64_stays_float64():
    tensors = tensors_of(3, 10, torch.float64)
    ours = loss_and_gradients(distillation_loss, tensors, ("soft", 0.3, 2.0, 0.1), lambda t: t)
    exact = loss_and_gradients(reference, tensors, ("soft", 0.3, 2.0, 0.1), lambda t: t)
    for mine, truth in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.ones(3)}, r"logits must have shape \[batch, classes\], got \[3\]"),
        ({"dist_logits": torch.ones(3, 9)}, r"one shape, got \[3, 10\] and \[3, 9\]"),
        ({"teacher_logits": torch.ones(3, 9)}, r"student's shape \[3, 10\], got \[3, 9\]; use a teacher trained on"),
        ({"targets": torch.ones(3)}, r"labels \[3\] of an integer dtype or soft targets \[3, 10\]"),
        ({"targets": torch.ones(3, 10, dtype=torch.int64)}, r"got \[3, 10\] of torch.int64"),
        ({"targets": torch.tensor([0, 10, 1])}, "between 0 and 9 .*, got 10 at index 1"),
        ({"targets": torch.tensor([0, 1, -2])}, "between 0 and 9 .*, got -2 at index 2"),
        ({"distillation_type": "none"}, "'soft' or 'hard', got 'none'"),
        ({"alpha": 1.5}, "alpha must lie between 0 and 1, got 1.5"),
        ({"alpha": torch.nan}, "alpha must lie between 0 and 1, got nan"),
        ({"tau": 0.0}, "tau must be positive, got 0.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie between 0 and 1, got -0.1"),
        ({"dist_logits": torch.ones(3, 10, device="meta")}, "dist_logits is on meta, the input on cpu"),
    ],
)
def test_a_mistake_is_one_clear_error(change, message):
    arguments = {
        "logits": torch.ones(3, 10),
        "dist_logits": torch.ones(3, 10),
        "targets": torch.tensor([0, 1, -100]),
        "teacher_logits": torch.ones(3, 10),
        "distillation_type": "soft",
        "alpha": 0.5,
        "tau": 1.0,
        "ignore_index": -100,
    }
    with pytest.raises(ValueError, match=message):
        distillation_loss(**arguments | change)


@everywhere
def test_a_float16_sum_that_passes_its_range_before_the_division_does_not_overflow(chosen):
    """Drawn by `make fuzz`: the original formula is infinite there, whose label smoothing sums over all classes."""
    tensors, options = tensors_of(4, 2048, torch.float16), ("soft", 0.5, 1.0, 0.1)
    tensors[0], tensors[3] = randn(4, 2048, dtype=torch.float16), randn(4, 2048, dtype=torch.float16, scale=4)
    assert -F.log_softmax(tensors[0].double(), dim=1).sum() > 1.01 * torch.finfo(torch.float16).max
    with backend.forced(chosen):
        ours = loss_and_gradients(distillation_loss, tensors, options, lambda t: t)
    exact = loss_and_gradients(reference, tensors, options, torch.Tensor.double)
    step = 2.0**-24  # of float16's subnormal numbers, as small gradients are
    for mine, truth in zip(ours, exact, strict=True):
        assert ((mine.double() - truth).abs() <= 2e-3 * truth.abs() + step).all()
