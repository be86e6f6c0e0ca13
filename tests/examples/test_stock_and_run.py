"""Each script runs to its end on real handwritten digits, stock and with `deit-fast run`, with the same metrics."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import deit_fast
from deit_fast.cli.main import main
from deit_fast.train import digits

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
pytest.importorskip("timm")
pytest.importorskip("torchvision")
pytest.importorskip("accelerate")
import deit_fast.transformers as ours  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
TRAINER = "--do_train --do_eval --use_cpu --disable_tqdm True --report_to none --save_strategy no --output_dir runs "
TRAINER += "--train_dir digits/train --validation_dir digits/validation --learning_rate 1e-3 --num_train_epochs 2 "
TRAINER += "--per_device_train_batch_size 10 --per_device_eval_batch_size 50"
TIMM = "--data-dir digits --img-size 16 --num-classes 10 --model-kwargs patch_size=8 depth=2 embed_dim=96 num_heads=3 "
TIMM += "-b 10 --epochs 2 --lr 1e-3 --no-aug"
SCRIPTS = {
    "class head alone": (EXAMPLES / "image_classification.py", f"{TRAINER} --model_name_or_path student"),
    "with a teacher": (
        EXAMPLES / "image_classification.py",
        f"{TRAINER} --model_name_or_path student --teacher_name_or_path teacher --distillation soft",
    ),
    "masked images": (
        EXAMPLES / "masked_image_modeling.py",
        f"{TRAINER} --image_size 16 --patch_size 4 --mask_patch_size 8 --mask_ratio 0.5 "
        f"--config_overrides {','.join(f'{name}={value}' for name, value in SMALL.items())}",
    ),
    "timm": (Path(__file__).parent / "timm_training.py", f"{TIMM} --model deit_tiny_patch16_224"),
    "timm with a teacher": (
        Path(__file__).parent / "timm_training.py",
        f"{TIMM} --drop-path 0.1 --model deit_tiny_distilled_patch16_224 --kd-model-name deit3_small_patch16_224",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """digits/{train,validation}/0..9/*.png, and a student and a teacher with their image processors."""
    root = tmp_path_factory.mktemp("digits")
    for part, split, count in zip(("train", "validation"), digits.load(), (500, 100), strict=True):
        for number, (pixels, label) in enumerate(zip(split.pixels[:count], split.labels[:count], strict=True)):
            path = root / "digits" / part / str(label.item()) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert("RGB").save(path)
    torch.manual_seed(0)
    for name, class_name in (("student", "DeiT"), ("teacher", "ViT")):
        config = getattr(transformers, f"{class_name}Config")(**SMALL, image_size=16, patch_size=8, num_labels=10)
        config.id2label = {number: str(number) for number in range(10)}
        config.label2id = {str(number): number for number in range(10)}
        getattr(transformers, f"{class_name}ForImageClassification")(config).save_pretrained(root / name)
        sides = {"height": 16, "width": 16}
        ours.DeiTImageProcessor(size=sides, crop_size=sides).save_pretrained(root / name)
    return root


class RunsAsStock:
    """Builds the class for two heads with stock modules: transformers' own doesn't train."""

    learns = staticmethod(ours.DeiTForImageClassificationWithTeacher.from_pretrained)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        model = cls.learns(*args, **kwargs)
        deit_fast.restore(model)
        return model


@pytest.mark.parametrize("which", SCRIPTS)
def test_the_metrics_are_the_same_stock_and_swapped(which, folder, monkeypatch, capsys) -> None:
    script, arguments = SCRIPTS[which]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [str(script), *arguments.split()])
    # An example's classes are born swapped: here transformers' stand for them.
    for name in ("DeiTForImageClassification", "DeiTForMaskedImageModeling"):
        monkeypatch.setattr(ours, name, getattr(transformers, name))
    with monkeypatch.context() as names:
        names.setattr(ours, "DeiTForImageClassificationWithTeacher", RunsAsStock)
        runpy.run_path(str(script), run_name="__main__")
    stock = capsys.readouterr()
    main(["run", "--report", str(script), *arguments.split()])
    swapped = capsys.readouterr()

    metrics, expected = (ast.literal_eval(each.out.splitlines()[-1]) for each in (swapped, stock))
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    if which != "masked images":  # of 100 images one may lie on the edge
        assert metrics["eval_accuracy"] == pytest.approx(expected["eval_accuracy"], abs=0.011)
    if which in ("class head alone", "timm"):  # the teachers know nothing
        assert metrics["eval_accuracy"] > 0.5
    assert "modules swapped" in swapped.err and "modules swapped" not in stock.err
    calls = re.findall(r"^\S+ +\w+ +\d+ +(\d+) +(\d+)$", swapped.err, re.MULTILINE)
    assert sum(int(fused) for fused, _ in calls) and not sum(int(stock) for _, stock in calls)
