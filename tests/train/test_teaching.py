"""A run's teacher: what it is given, what it answers, and that its answers can be kept for the next run."""

import json
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch import nn

from deit_fast._extras import require
from deit_fast.train import digits, teaching
from deit_fast.train.run import Run
from deit_fast.train.teaching import Teacher
from tests.train.test_build import saved
from tests.train.test_run import assert_same_end, job, small

KEY = (0, 0, 0)
BATCH = 16
STUDENT = {"mean": (0.4,) * 3, "std": (0.25,) * 3}


def taught(teacher: Teacher, images: torch.Tensor) -> torch.Tensor:
    teacher.begin(images, KEY)
    return teacher(images)


def conv_net(classes: int = 10) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=classes).eval()


# -- what it computes


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_teacher_gets_images_as_it_knows_them(tmp_path, monkeypatch, compiled):
    compiles, compile_it = [], nn.Module.compile

    def quickly(self):
        compiles.append(self)
        compile_it(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", quickly)
    model = conv_net()
    teacher = Teacher(teaching.load(saved(model, tmp_path / "teacher")), STUDENT, compiled=compiled)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, expected = taught(teacher, (images - 0.4) / 0.25), model((images - 0.5) / 0.5)
    assert torch.allclose(logits, expected, atol=1e-5) and len(compiles) == compiled
    assert not logits.requires_grad and not logits.is_inference() and not teacher.training and teacher.seconds > 0


def test_a_convolutional_teacher_is_folded_and_channels_last_once_it_is_asked(tmp_path):
    teacher = Teacher(teaching.load(saved(conv_net(), tmp_path / "teacher")), STUDENT)
    assert any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules())
    taught(teacher, torch.rand(1, 3, 32, 32))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in teacher.model.modules())
    convolutions = [module.weight for module in teacher.model.modules() if isinstance(module, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_images_are_resized_for_a_teacher_of_one_size(tmp_path):
    sizes = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 1, "img_size": 16}
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=3, **sizes)
    assert taught(Teacher(teaching.load(saved(vit, tmp_path)), STUDENT), torch.rand(2, 3, 24, 24)).shape == (2, 3)


def test_a_class_of_the_student_is_the_teachers_that_the_user_names(tmp_path):
    name = saved(conv_net(), tmp_path / "teacher")
    all_ten, three = Teacher(teaching.load(name), STUDENT), Teacher(teaching.load(name), STUDENT, classes=[7, 0, 7])
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(taught(three, images), taught(all_ten, images)[:, [7, 0, 7]])
    assert three.digest != all_ten.digest


@pytest.mark.parametrize(("text", "numbers"), [("[3, 1]", [3, 1]), ("3\n1\n", [3, 1])])
def test_classes_are_read_from_json_and_from_lines(tmp_path, text, numbers):
    (tmp_path / "classes").write_text(text)
    assert teaching.read_classes(str(tmp_path / "classes")) == numbers


@pytest.mark.parametrize("text", ["", "cat", "[1.5]", "[-1]", "[1", "[true]"])
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / "classes").write_text(text)
    with pytest.raises(ValueError, match="classes must "):
        teaching.read_classes(str(tmp_path / "classes"))


# -- transformers'


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.3] * 3, image_std=[0.2] * 3).save_pretrained(folder)
    return folder


def test_a_teacher_of_transformers_gets_images_by_its_processor(theirs):
    model = transformers.AutoModelForImageClassification.from_pretrained(theirs).eval()
    loaded = teaching.load(str(theirs))
    assert loaded.num_classes == 2
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        logits, expected = taught(Teacher(loaded, STUDENT), (images - 0.4) / 0.25), model((images - 0.3) / 0.2).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def test_a_vit_of_transformers_is_swapped_and_gets_its_size(tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    assert taught(Teacher(teaching.load(str(tmp_path)), STUDENT), torch.rand(2, 3, 24, 24)).shape == (2, 2)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("microsoft/resnet-50", True), ("regnety_160", False), ("timm/regnety_160", False), ("hf-hub:a/b", False)],
)
def test_a_name_with_a_slash_is_transformers(name, theirs, monkeypatch):
    monkeypatch.setattr(teaching, "_of_transformers", lambda name: "transformers")
    monkeypatch.setattr(teaching.build, "pretrained", lambda name, classes: conv_net())
    assert (teaching.load(name) == "transformers") is theirs


def test_what_transformers_can_not_give_is_named(theirs, tmp_path, monkeypatch):
    transformers.ResNetModel.from_pretrained(theirs).save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trained classifier: it has no classifier"):
        teaching.load(str(tmp_path))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="transformers can't load"):
        teaching.load(str(tmp_path))

    def missing(module, extra):
        return require("a_module_of_nobody" if module == "transformers" else module, extra)

    monkeypatch.setattr(teaching, "require", missing)
    with pytest.raises(ImportError, match=r'pip install "deit_fast\[transformers\]"'):
        teaching.load("somebody/resnet")


# -- kept


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    digits.write_folder(root, most=80)
    return root


@pytest.fixture(scope="module")
def name(tmp_path_factory) -> str:
    torch.manual_seed(0)
    return saved(conv_net(), tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Grows with each batch that a teacher computes logits for."""
    calls, answer = [], Teacher._answer

    def counted(self, images):
        calls.append(len(images))
        return answer(self, images)

    monkeypatch.setattr(Teacher, "_answer", counted)
    return calls


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in map(json.loads, (out / "log.jsonl").open()) if "loss" in record]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_run_with_kept_logits_ends_as_the_one_with_a_teacher(folders, name, tmp_path, asked, kind):
    made = small(distillation_type=kind, batch_size=BATCH, epochs=2)
    for out, kept in (("none", None), ("first", "kept"), ("again", "kept")):
        asked.clear()
        given = {"teacher": name, "teacher_logits": kept and str(tmp_path / kept)}
        run = Run(made, job(folders, tmp_path / out, log_every=1, save_every=None, **given))
        assert run.train()
        assert len(asked) == (0 if out == "again" else run.steps)
    assert any(isinstance(module, nn.BatchNorm2d) for module in run.teacher.model.modules())  # it was not even prepared
    assert losses(tmp_path / "none") == losses(tmp_path / "first") == losses(tmp_path / "again")
    for out in ("first", "again"):
        assert_same_end(tmp_path / out, tmp_path / "none")


def test_a_stopped_run_goes_on_in_its_cache(folders, name, tmp_path, asked):
    """Killed two steps after its last checkpoint, with the batch in two parts: what those had computed is lost."""
    made, parts = small(distillation_type="soft", batch_size=BATCH, epochs=2), 2
    given = {"teacher": name, "teacher_logits": str(tmp_path / "kept"), "grad_accum_steps": parts}

    class Killed(Exception):
        pass

    def kill(step, *_):
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        Run(made, job(folders, tmp_path / "out", log_every=1, save_every=3, **given)).train(kill)
    asked.clear()
    run = Run(made, job(folders, tmp_path / "out", save_every=3, resume="auto", **given))
    assert run.step == 3 and run.train()
    assert asked == [BATCH // parts] * (run.steps - 3) * parts
    asked.clear()
    assert Run(made, job(folders, tmp_path / "again", save_every=3, **given)).train() and asked == []
    assert_same_end(tmp_path / "again", tmp_path / "out")


def test_a_cache_of_other_images_or_of_another_teacher_is_refused(folders, name, tmp_path):
    made = {"distillation_type": "hard"}
    given = {"teacher": name, "teacher_logits": str(tmp_path / "kept")}
    Run(small(**made), job(folders, tmp_path / "out", **given))
    Run(small(**made, lr=1e-3, epochs=5), job(folders, tmp_path / "longer", **given))
    with pytest.raises(ValueError, match=r"kept is of another run: its reprob was 0.25, now it is 0.0"):
        Run(small(**made, reprob=0), job(folders, tmp_path / "out", **given))
    other = saved(timm.create_model("test_resnet", num_classes=10), tmp_path / "other")
    with pytest.raises(ValueError, match="kept is of another run: its teacher was"):
        Run(small(**made), job(folders, tmp_path / "out", **given | {"teacher": other}))
    with pytest.raises(ValueError, match="kept is of another run: its parts was 1, now it is 2"):
        Run(small(**made), job(folders, tmp_path / "out", **given, grad_accum_steps=2))


@pytest.mark.parametrize(
    ("numbers", "message"), [("0 1 2", "must name 10 classes"), ("0 1 2 3 4 5 6 7 8 10", "to 9; it has 10, up to 10")]
)
def test_a_mapping_must_be_of_the_students_classes_to_the_teachers(folders, name, tmp_path, numbers, message):
    (tmp_path / "classes").write_text(numbers)
    given = {"teacher": name, "teacher_classes": str(tmp_path / "classes")}
    with pytest.raises(ValueError, match=message):
        Run(small(distillation_type="hard"), job(folders, tmp_path / "out", **given))
