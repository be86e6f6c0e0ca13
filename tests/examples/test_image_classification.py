"""examples/image_classification.py, both ways."""

from pathlib import Path

import numpy as np
import pytest

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")

from examples.image_classification import main  # noqa: E402
from tests.transformers.models import stock  # noqa: E402

COLOURS = {"blue": (20, 40, 220), "green": (30, 200, 60), "red": (210, 30, 40)}


def folders(root: Path) -> None:
    """Images of three colours; a student that knows other classes, and a teacher that knows these in another order."""
    noise = np.random.default_rng(0)
    for part in ("train", "validation"):
        for name, colour in COLOURS.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = np.clip(noise.normal(colour, 20, (40, 50, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    for name, class_name, size, names in (
        ("student", "DeiTForImageClassification", 32, ["cat", "dog"]),
        ("teacher", "ViTForImageClassification", 24, ["red", "green", "blue"]),
    ):
        model = stock(class_name, image_size=size, num_labels=len(names))
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {each: number for number, each in enumerate(names)}
        model.save_pretrained(root / name)
        transformers.DeiTImageProcessor(size=size, crop_size=size).save_pretrained(root / name)


@pytest.mark.parametrize("teacher", [False, True], ids=["class head alone", "with a teacher"])
def test_a_run_learns_and_saves_a_folder_that_transformers_loads(teacher: bool, tmp_path) -> None:
    folders(tmp_path)
    arguments = {
        "model_name_or_path": tmp_path / "student",
        "train_dir": tmp_path / "train",
        "validation_dir": tmp_path / "validation",
        "output_dir": tmp_path / "runs",
        "num_train_epochs": 5,
        "learning_rate": 1e-3,
    }
    if teacher:
        arguments |= {"teacher_name_or_path": tmp_path / "teacher", "distillation": "soft", "alpha": 0.1}
    flags = ["--do_train", "--do_eval", "--ignore_mismatched_sizes", "--use_cpu", "--disable_tqdm", "True"]
    metrics = main([*flags, *(str(word) for name, value in arguments.items() for word in (f"--{name}", value))])
    assert metrics["eval_accuracy"] == 1.0
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "runs")
    assert type(loaded).__name__ == f"DeiTForImageClassification{'WithTeacher' if teacher else ''}"
    assert loaded.config.id2label == dict(enumerate(COLOURS))
