"""`deit-fast train`, `finetune` and `pretrain`, through `main` as the console script calls it."""

import json
import re
from pathlib import Path

import pytest

from deit_fast.cli import train
from deit_fast.cli.main import main
from deit_fast.train import run as runs
from tests.train.test_samples import folders

SMALL = "--model deit_tiny_patch16_224 --model-kwargs patch_size=8 depth=1 embed_dim=32 num_heads=1 --input-size 16"
FEW = "--batch-size 2 --epochs 2 --warmup-epochs 0 --num-workers 0 --cpu"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return folders(tmp_path / "images")


def arguments(images: Path, out: Path, more: str = "", command: str = "train") -> list[str]:
    return f"{command} --data-path {images} --output-dir {out} {SMALL} {FEW} {more}".split()


def test_a_run_is_logged_and_can_be_resumed(images, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(images, out, "--lr 1e-3 --recipe deit")) == 0
    printed = capsys.readouterr().out
    assert "epoch 2: " in printed and f"% of the validation images, {out}/best." in printed
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log if "val_accuracy" in record] == [0, 1]

    assert main(arguments(images, out, "--lr 1e-3 --resume auto")) == 0
    assert "Resumed after step 6 of 6." in capsys.readouterr().out
    assert main(arguments(images, out, "--lr 1e-3")) == 2
    assert "--resume auto goes on" in capsys.readouterr().err


def test_the_folder_of_the_best_average_scores_what_is_printed(images, tmp_path, capsys):
    assert main(arguments(images, tmp_path / "out", "--lr 0.1 --model-ema --model-ema-decay 0.5")) == 0
    printed = capsys.readouterr().out
    best = re.search(r"Best: (.*) % of the validation images, (.*/ema)\.", printed)
    assert main(f"eval --model {best[2]} --data-path {images} --num-workers 0 --cpu".split()) == 0
    evaluated = capsys.readouterr().out
    assert f", {best[1]} % of" in evaluated
    losses = re.findall(r"EMA (.*) %, validation loss (.*)", printed)
    assert re.match("loss (.*),", evaluated)[1] in [loss for score, loss in losses if score == best[1]]


def test_corrupt_images_are_said_aloud(images, tmp_path, capsys):
    (images / "train" / "a" / "0.png").write_bytes(b"")
    assert main(arguments(images, tmp_path / "out", "--no-repeated-aug")) == 2
    assert "1 of 6 images can't be read, a/0.png (the file is not an image" in capsys.readouterr().err
    assert main(arguments(images, tmp_path / "again", "--no-repeated-aug --max-corrupt 0.2")) == 0
    printed = capsys.readouterr().out
    assert "1 train images can't be read: a/0.png" in printed and "1 training images could not be read" in printed


def test_a_run_that_is_told_to_stop_says_how_it_goes_on(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs.Run, "_stopping", lambda self: True)
    assert main(arguments(images, tmp_path / "out")) == 143
    assert "Stopped after step 1 of 6; --resume auto goes on." in capsys.readouterr().out


def test_what_was_pretrained_is_finetuned(images, tmp_path, capsys):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert main(arguments(images, first, "--mask-patch-size 8", "pretrain")) == 0
    printed = capsys.readouterr().out
    assert "epoch 2: validation loss " in printed and "Best: validation loss " in printed
    # A file says nothing of its model, a folder does.
    assert main(arguments(images, second, f"--finetune {first}/best/model.safetensors", "finetune")) == 0
    assert "epoch 2: " in capsys.readouterr().out
    more = f"--output-dir {third} {FEW} --finetune {second}/best --linear-probe --input-size 32"
    assert main(f"finetune --data-path {images} {more}".split()) == 0
    assert f"% of the validation images, {third}/best." in capsys.readouterr().out


@pytest.mark.parametrize("command", train.COMMANDS)
def test_the_help_is_read_on_one_screen(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(lines) <= 50 and max(map(len, lines)) <= train.WIDTH
    assert all(f"{group}:" in "".join(lines) for group in ("data", "run", "files", "augmentation"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--learning-rate 1", "unrecognized arguments: --learning-rate"),
        ("--smooth 0.1", "unrecognized arguments: --smooth"),  # no abbreviation
        ("--lr fast", "lr must be float"),
        ("--batch-size 3", "batch_size must be even"),
        ("--no-swap --memory low", "memory is of swapped models"),
        ("--recipe deit4", "there is no recipe 'deit4'"),
        ("--distillation-type hard", "needs --teacher"),
        ("--distillation-tau 2", "distillation_tau is given, and would change nothing"),
        ("--model-kwargs depth", "expected NAME=VALUE"),
        ("--mixed-precision fp16", "fp16"),
    ],
)
def test_what_is_wrong_is_refused_before_data_is_touched(images, tmp_path, capsys, monkeypatch, more, message):
    def untouched(*_, **__):
        pytest.fail("data was opened")

    monkeypatch.setattr(runs, "open_data", untouched)
    try:
        code = main(arguments(images, tmp_path / "out", more))
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("finetune", "finetune needs --finetune"),
        ("finetune --finetune none.pth", "no checkpoint at none.pth"),
        ("finetune --finetune deit_gigantic", "can't make the model deit_gigantic"),
        ("finetune --finetune test_vit --model test_vit", "model is given, and would change nothing"),
        ("finetune --finetune test_vit --linear-probe --drop-path 0.1", "drop_path is given, and would change nothing"),
        ("finetune --finetune test_vit --layer-decay 2", "layer_decay must be above 0 and at most 1"),
        ("train --linear-probe", "linear_probe needs finetune"),
        ("train --mask-patch-size 16", "mask_patch_size is given, and would change nothing without mask_ratio"),
        ("train --mask-ratio 0.6", "there are no classes to learn: mixup must be 0"),
        ("pretrain --mask-ratio 1", "mask_ratio must be between 0 and 1"),
        ("pretrain --mask-ratio none", "pretrain needs --mask-ratio"),
        ("pretrain --input-size 48", "must divide the image's 48 x 48 pixels"),
        ("pretrain --distillation-type hard", "mask_ratio and distillation_type exclude each other"),
        ("pretrain --model test_resnet", "masked image modelling needs a ViT"),
    ],
)
def test_what_contradicts_a_finetuning_or_pretraining_is_refused(images, tmp_path, capsys, monkeypatch, more, message):
    def untouched(*_, **__):
        pytest.fail("data was opened")

    monkeypatch.setattr(runs, "open_data", untouched)
    assert main(f"{more} --data-path {images} --output-dir {tmp_path}/out --cpu".split()) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path, capsys):
    assert main(arguments(tmp_path / "none", tmp_path / "out")) == 2
    assert f"there is no folder {tmp_path}/none" in capsys.readouterr().err
