"""`deit-fast eval`, through `main` as the console script calls it."""

import pytest
import timm
import torch

from deit_fast.cli.main import main
from deit_fast.cli.train import WIDTH
from tests.train.test_samples import folders


@pytest.fixture
def model(tmp_path):
    """As timm saves it, with the answer "class 1" for every image."""
    made = timm.create_model("test_vit", num_classes=3, img_size=16)
    torch.nn.init.zeros_(made.head.weight)
    made.head.bias.data = torch.tensor([0.0, 9.0, 0.0])
    timm.models.save_for_hf(made, str(tmp_path / "model"), safe_serialization=True)
    return tmp_path / "model"


def evaluate(model, images, more: str = "") -> int:
    return main(f"eval --model {model} --data-path {images} --batch-size 4 --num-workers 0 --cpu {more}".split())


@pytest.mark.parametrize("classes", [("a", "b", "c"), ("b", "c")])
def test_the_share_of_right_answers_is_that_of_the_validation_images(model, tmp_path, capsys, classes):
    images = folders(tmp_path / "images", val=classes)
    assert evaluate(model, images) == 0
    assert f"{100 / len(classes):.2f} % of {2 * len(classes)} images" in capsys.readouterr().out


def test_a_model_of_other_classes_is_the_users_mistake(model, tmp_path, capsys):
    assert evaluate(model, folders(tmp_path / "images", train=(), val=("a", "b"))) == 2
    assert "knows 3 classes, the images have 2" in capsys.readouterr().err


def test_images_that_can_not_be_read_are_left_out_and_named(model, tmp_path, capsys):
    images = folders(tmp_path / "images")
    for name in ("a/0.png", "a/1.png"):
        (images / "val" / name).write_bytes(b"")
    assert evaluate(model, images) == 0
    printed = capsys.readouterr()
    assert "50.00 % of 4 images" in printed.out and "can't be read: 2 images, a/0.png (" in printed.err
    for file in (images / "val").rglob("*.png"):
        file.write_bytes(b"")
    assert evaluate(model, images) == 2
    assert "6 of 6 images can't be read" in capsys.readouterr().err


def test_the_help_is_in_groups_that_fit_a_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and max(map(len, lines)) <= WIDTH
    assert {"model:", "data:", "run:"} <= set(lines)
