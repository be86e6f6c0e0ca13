"""DeiTForImageClassificationWithTeacher in training."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import deit_fast
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls

transformers = pytest.importorskip("transformers")
from deit_fast.transformers import DeiTForImageClassificationWithTeacher, TeacherInputs  # noqa: E402
from tests.swap.helpers import randomise  # noqa: E402
from tests.swap.transformers_models import layer_calls, pixels  # noqa: E402
from tests.transformers.models import config, same_weights, stock  # noqa: E402

LABELS = torch.tensor([3, 9])


class Teacher(nn.Module):
    """Notes what it is asked, and in which mode."""

    def __init__(self, classes: int = 10, size: int = 32) -> None:
        super().__init__()
        self.head = nn.Linear(3 * size * size, classes)
        self.seen: list[Tensor] = []
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.seen.append(images)
        return self.head(images.flatten(1))


def student(teacher: nn.Module | None = None, classes: int = 10, **options) -> nn.Module:
    model = DeiTForImageClassificationWithTeacher(config(num_labels=classes), teacher, **options)
    return randomise(model).train()


def teacher_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return model.teacher(x)


@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
def test_the_loss_is_the_distillation_losss(kind: str) -> None:
    x, options = pixels(), {"distillation": kind, "alpha": 0.3, "tau": 2.0}
    model = student(Teacher(), **options)
    result = model(x, labels=LABELS)
    assert list(result.keys()) == ["loss", "logits", "cls_logits", "distillation_logits"]
    assert_close(result.logits, (result.cls_logits + result.distillation_logits) / 2)
    # transformers' own model, with the criterion of a training loop.
    expected, teacher = stock("DeiTForImageClassificationWithTeacher").train(), nn.Module().eval()
    teacher.forward = lambda inputs: teacher_of(model, inputs).clone()
    criterion = deit_fast.DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, 0.3, 2.0)
    control = criterion(x, expected(x), LABELS)
    assert_close(result.loss, control)
    assert_same_gradients(gradients(model, result.loss), gradients(expected, control))


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_classes_are_distilled_in_one_operator(kind: str) -> None:
    model, x = student(Teacher(), distillation=kind), pixels()
    calls = operator_calls(lambda: model(x, labels=LABELS))
    assert calls == layer_calls(distillation_loss=1)


@pytest.mark.parametrize(
    "classes, labels, problem",
    [(1, torch.randn(2), "regression"), (10, torch.eye(10)[:2], "multi_label_classification")],
)
def test_other_kinds_of_labels_have_transformers_loss_for_a_base(classes: int, labels: Tensor, problem: str) -> None:
    model, x = student(Teacher(classes), classes, distillation="soft", alpha=0.25), pixels()
    result = model(x, labels=labels)
    if problem == "regression":
        base = nn.functional.mse_loss(result.cls_logits.squeeze(), labels)
    else:
        base = nn.functional.binary_cross_entropy_with_logits(result.cls_logits, labels)
    teacher = teacher_of(model, x).clone().log_softmax(1)
    log_p = result.distillation_logits.log_softmax(1)
    distillation = nn.functional.kl_div(log_p, teacher, log_target=True, reduction="none").mean()
    assert_close(result.loss, 0.75 * base + 0.25 * distillation)
    assert model.config.problem_type == problem


def test_a_loss_function_of_the_users_own_is_the_base() -> None:
    model, x = student(Teacher(), alpha=0.0), pixels()
    model.loss_function = lambda labels, logits, config, **kwargs: logits.sum()
    result = model(x, labels=LABELS)
    assert_close(result.loss, result.cls_logits.sum())


def test_evaluation_judges_the_average_and_asks_no_teacher() -> None:
    model, x = student(Teacher()).eval(), pixels()
    result = model(x, labels=LABELS)
    assert_close(result.loss, nn.functional.cross_entropy(result.logits, LABELS))
    assert not model.teacher.seen


def test_a_teachers_logits_may_be_given_instead() -> None:
    x, teacher = pixels(), Teacher()
    expected = student(teacher)(x, labels=LABELS).loss
    assert_close(student()(x, labels=LABELS, teacher_logits=teacher.head(x.flatten(1)).detach()).loss, expected)
    assert len(teacher.seen) == 1


def test_parts_of_a_step_add_up_to_its_loss() -> None:
    model, x, labels = student(Teacher()), pixels(6), torch.arange(6)
    whole = model(x, labels=labels).loss
    parts = [model(x[rows], labels=labels[rows], num_items_in_batch=6).loss for rows in (slice(0, 4), slice(4, 6))]
    assert_close(sum(parts), whole)


# The teacher --------------------------------------------------------------------------------------------------------


def test_the_teacher_is_no_part_of_the_model(tmp_path) -> None:
    model, plain = student(Teacher(), teacher_inputs=nn.Linear(32, 32)), student()
    for names in ("state_dict", "named_parameters", "named_modules"):
        assert [name for name, *_ in _items(model, names)] == [name for name, *_ in _items(plain, names)]
    model.train()
    assert not model.teacher.training
    model.teacher = Teacher()
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
    assert same_weights(loaded, model)


def _items(model: nn.Module, names: str):
    found = getattr(model, names)()
    return found.items() if isinstance(found, dict) else found


def test_from_pretrained_takes_a_teacher_and_leaves_it_alone(tmp_path) -> None:
    stock("DeiTForImageClassificationWithTeacher").save_pretrained(tmp_path)
    teacher = Teacher(classes=20)
    weights = copy.deepcopy(teacher.state_dict())
    options = {"teacher": teacher, "distillation": "soft", "tau": 3.0, "teacher_classes": range(10, 20)}
    model = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, dtype=torch.bfloat16, **options).train()
    assert model.teacher is teacher and model.tau == 3.0
    assert all(torch.equal(value, weights[name]) for name, value in teacher.state_dict().items())
    model(pixels().bfloat16(), labels=LABELS).loss.backward()
    assert teacher.head.weight.dtype is torch.float32 and teacher.head.weight.grad is None


def test_the_teacher_may_be_a_model_of_transformers() -> None:
    model = student(stock("ViTForImageClassification"))
    assert torch.isfinite(model(pixels(), labels=LABELS).loss)


def test_the_teacher_may_be_under_data_parallel() -> None:
    x, teacher = pixels(), stock("ViTForImageClassification", num_labels=10).eval()
    losses = []
    for given in (teacher, nn.DataParallel(teacher).eval()):
        torch.manual_seed(0)
        losses.append(student(given)(x, labels=LABELS).loss)
    assert torch.equal(*losses)
    with pytest.raises(ValueError, match="the teacher has 10 classes and the model 7"):
        student(nn.DataParallel(teacher), classes=7)


def test_copies_on_several_gpus_do_not_move_their_teacher_about() -> None:
    model = student(Teacher().to("meta"))
    model._is_replica = True  # as nn.DataParallel marks them
    with pytest.raises(RuntimeError, match=r"wrap the teacher in nn\.DataParallel, give teacher_logits"):
        model(pixels(), labels=LABELS)
    model(pixels(), labels=LABELS, teacher_logits=torch.randn(2, 10))


def test_copies_keep_the_teacher() -> None:
    model, x = student(stock("ViTForImageClassification"), distillation="soft"), pixels()
    expected = model(x, labels=LABELS).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x, labels=LABELS).loss, expected)


def test_a_teacher_in_training_mode_is_put_into_evaluation_and_it_is_said() -> None:
    teacher = Teacher().train()
    with pytest.warns(UserWarning, match="the teacher was in training mode"):
        model = student(teacher)
    teacher.train()
    with pytest.warns(UserWarning, match="the teacher was in training mode"):
        model(pixels(), labels=LABELS)
    assert not teacher.training


def test_the_teacher_sees_its_own_size_and_normalisation() -> None:
    student_processor = deit_fast.DeiTImageProcessor(size=32, crop_size=32)
    teacher_processor = deit_fast.DeiTImageProcessor(
        size=24, crop_size=24, image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)
    )
    teacher = Teacher(size=24)
    model = student(teacher, teacher_inputs=TeacherInputs(student_processor, teacher_processor))
    # Smooth, so that resizing to 32 and then to 24 is nearly resizing to 24.
    image = torch.linspace(0, 255, 64).expand(3, 64, 64).round().to(torch.uint8)
    x = student_processor([image, image], return_tensors="pt").pixel_values
    model(x, labels=LABELS)
    expected = teacher_processor([image, image], return_tensors="pt").pixel_values
    torch.testing.assert_close(teacher.seen[0], expected, rtol=0, atol=0.05)


def test_inputs_of_the_same_size_are_normalised_alone() -> None:
    processor = deit_fast.DeiTImageProcessor(size=32, crop_size=32)
    other = deit_fast.DeiTImageProcessor(size=40, crop_size=32, image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    x, expected = (p(image, return_tensors="pt", do_resize=False).pixel_values for p in (processor, other))
    torch.testing.assert_close(TeacherInputs(processor, other)(x), expected, rtol=0, atol=1e-5)


# Classes ------------------------------------------------------------------------------------------------------------


def test_a_teacher_with_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="the teacher has 7 classes and the model 10: give teacher_classes"):
        student(stock(num_labels=7))
    model = student(Teacher(classes=7))
    with pytest.raises(ValueError, match="the teacher has 7 classes and the model 10: give teacher_classes"):
        model(pixels(), labels=LABELS)


def test_a_teacher_with_the_same_classes_in_another_order_is_refused() -> None:
    teacher = stock(id2label={0: "cat", 1: "dog"}, num_labels=2)
    names = config(id2label={0: "dog", 1: "cat"}, num_labels=2)
    with pytest.raises(ValueError, match="class 0 is 'cat' to the teacher and 'dog' to the model"):
        DeiTForImageClassificationWithTeacher(names, teacher)
    DeiTForImageClassificationWithTeacher(names, teacher, teacher_classes=[1, 0])


@pytest.mark.parametrize("given", [True, False])
def test_teacher_classes_map_the_teachers_to_the_models(given: bool) -> None:
    x, teacher, order = pixels(), Teacher(classes=20), list(range(19, 9, -1))
    model = student(teacher, distillation="soft", teacher_classes=order)
    logits = teacher.head(x.flatten(1)).detach()
    loss = model(x, labels=LABELS, **({"teacher_logits": logits} if given else {})).loss
    assert_close(loss, student(distillation="soft")(x, labels=LABELS, teacher_logits=logits[:, order]).loss)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"distillation": "firm"}, "distillation must be one of"),
        ({"alpha": 1.5}, "must lie between 0 and 1, got 1.5"),
        ({"tau": 0.0}, "must be positive, got 0.0"),
        ({"teacher_classes": [1, 2]}, "teacher_classes must have 10 entries, got 2"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student(Teacher(), **options)


def test_training_without_a_teacher_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="needs a teacher at construction or teacher_logits in the call"):
        student()(pixels(), labels=LABELS)
    assert torch.isfinite(student(distillation="none")(pixels(), labels=LABELS).loss)


def test_a_teacher_without_labels_is_not_silent() -> None:
    with pytest.warns(UserWarning, match="a teacher without labels gives no loss"):
        assert student(Teacher())(pixels()).loss is None


def test_a_training_step_compiles_whole() -> None:
    model, x = student(stock("ViTForImageClassification"), distillation="soft"), pixels()
    expected = model(x, labels=LABELS).loss
    control = gradients(model, expected)
    result = torch.compile(model, fullgraph=True, backend="aot_eager")(x, labels=LABELS).loss
    assert_close(result, expected)
    assert_same_gradients(gradients(model, result), control)
    torch.compiler.reset()


def test_a_teachers_size_that_gives_no_height_and_width_is_refused():
    other = deit_fast.DeiTImageProcessor(size={"max_height": 48, "max_width": 48}, do_center_crop=False)
    with pytest.raises(ValueError, match="height and width, or a shortest edge, got"):
        TeacherInputs(deit_fast.DeiTImageProcessor(), other)
