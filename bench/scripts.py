"""Whole training runs of others' scripts against `deit-fast run` of the same script and `deit-fast train`.

    python bench/scripts.py --timm train.py --transformers run_image_classification.py --work FOLDER

The scripts come from the repositories of timm and transformers; transformers' also needs datasets and evaluate. All
runs of a group have the same images (scikit-learn's digits), model, hyper-parameters and seed.
timm's has drop path 0.1 and a teacher whose class the distillation head learns, which a first run trains.
transformers' has neither.

Every seed runs each way in turn. A table has the accuracy of each seed after the last epoch, and the medians of the
wall-clock seconds and of the processes' CPU seconds. They are of all that a run does: imports, an evaluation and a
checkpoint each epoch.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import timm
import torch
import yaml
from torch import nn

from deit_fast.train.digits import write_folder

MODEL, TEACHER = "deit_tiny_distilled_patch16_224", "test_resnet"
PATCH = 8
# By the names of deit_fast's recipes.
OF_TIMM = {
    "model": MODEL,
    "model_kwargs": {"patch_size": PATCH},
    "drop_path": 0.1,
    "lr": 1e-3,
    "warmup_epochs": 1,
    "batch_size": 64,
    "unscale_lr": True,
    "eval_crop_ratio": 1.0,
    "repeated_aug": False,
    "scale": [0.6, 1.0],
    "hflip": 0.0,
    "aa": None,
    "color_jitter": None,
    "reprob": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
OF_TRANSFORMERS = OF_TIMM | {
    "lr": 5e-4, "sched": "none", "weight_decay": 0.0, "clip_grad": 1.0, "smoothing": 0.0, "drop_path": 0.0,
    "scale": [0.08, 1.0], "hflip": 0.5, "train_interpolation": "bilinear",
}  # fmt: skip


class Way(NamedTuple):
    """A command and what reads its accuracy, in percent, from its output folder."""

    name: str
    command: list[str]
    accuracy: Callable[[Path], float]


class Done(NamedTuple):
    accuracy: float
    wall: float
    cpu: float


def run(way: Way, folder: Path) -> Done:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    folder.mkdir(parents=True)
    with (folder / "output.txt").open("w") as output:
        subprocess.run(way.command, check=True, stdout=output, stderr=subprocess.STDOUT)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(way.accuracy(folder), wall, cpu)


def timms_accuracy(folder: Path) -> float:
    with next(folder.glob("*/summary.csv")).open() as file:
        return float(list(csv.DictReader(file))[-1]["eval_top1"])


def transformers_accuracy(folder: Path) -> float:
    return 100 * json.loads((folder / "eval_results.json").read_text())["eval_accuracy"]


def our_accuracy(folder: Path) -> float:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return 100 * [record["val_accuracy"] for record in records if "val_accuracy" in record][-1]


def deit_fast(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "deit_fast", *map(str, arguments)]


def train(recipe: dict, work: Path, name: str, folder: Path, *options: object) -> list[str]:
    """`deit-fast train` with a recipe."""
    path = work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shared = ("--cpu", "--data-path", work / "digits", "--num-workers", 1, "--output-dir", folder, "--recipe", path)
    return deit_fast("train", *shared, *options)


def ways_of_timm(script: str, work: Path, folders: list[Path], image: int, epochs: int, seed: int) -> list[Way]:
    recipe = OF_TIMM | {"input_size": image, "epochs": epochs}
    teacher = work / "teacher"
    if not teacher.exists():
        alone = {"model": TEACHER, "model_kwargs": {}, "lr": 8e-3, "epochs": 8, "drop_path": 0.0}
        subprocess.run(train(recipe | alone, work, "teacher", teacher), check=True, stdout=subprocess.DEVNULL)
    arguments = f"""
        {work}/digits --model {MODEL} --num-classes 10 --model-kwargs img_size={image} patch_size={PATCH}
        --input-size 3 {image} {image} --crop-pct 1.0 --train-interpolation bicubic --scale 0.6 1.0 --hflip 0.0
        --color-jitter 0.0 --smoothing 0.1 --drop-path 0.1 --opt adamw --lr 1e-3 --weight-decay 0.05 --sched cosine
        --epochs {epochs} --warmup-epochs 1 --warmup-lr 1e-6 --min-lr 1e-5 --batch-size 64 --workers 1 --device cpu
        --seed {seed} --checkpoint-hist 2 --kd-distill-type token --kd-token-distill-type hard --task-loss-weight 0.5
        --kd-model-name local-dir:{teacher}/best --output""".split()
    ours = train(
        recipe, work, "timm", folders[2], "--seed", seed, "--teacher", teacher / "best", "--distillation-type", "hard"
    )
    return ways("timm's `train.py`", [script, *arguments], timms_accuracy, folders, ours)


def ways_of_transformers(script: str, work: Path, folders: list[Path], image: int, epochs: int, seed: int) -> list[Way]:
    student = work / f"student-{seed}"
    _write_student(student, image, seed)
    arguments = f"""
        --train_dir {work}/digits/train --validation_dir {work}/digits/val --do_train --do_eval --use_cpu
        --model_name_or_path {student} --learning_rate 5e-4 --lr_scheduler_type constant --num_train_epochs {epochs}
        --per_device_train_batch_size 64 --per_device_eval_batch_size 64 --dataloader_drop_last True
        --dataloader_num_workers 1 --remove_unused_columns False --eval_strategy epoch --save_strategy epoch
        --save_total_limit 2 --seed {seed} --output_dir""".split()
    recipe = OF_TRANSFORMERS | {"input_size": image, "epochs": epochs}
    ours = train(recipe, work, "transformers", folders[2], "--seed", seed, "--finetune", student)
    name = "transformers' `run_image_classification.py`"
    return ways(name, [script, *arguments], transformers_accuracy, folders, ours)


def ways(
    name: str, script: list[str], accuracy: Callable[[Path], float], folders: list[Path], ours: list[str]
) -> list[Way]:
    """The script, stock and swapped, with its output folder as its last argument, and `deit-fast train`."""
    return [
        Way(name, [sys.executable, *script, str(folders[0])], accuracy),
        Way("the same under `deit-fast run`", deit_fast("run", *script, folders[1]), accuracy),
        Way("`deit-fast train`", ours, our_accuracy),
    ]


def _write_student(student: Path, image: int, seed: int) -> None:
    """An untrained DeiT of transformers' with timm's sizes, and its image processor."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"image_size": image, "patch_size": PATCH, "hidden_size": 192}
    config = transformers.DeiTConfig(**sizes, num_attention_heads=3, intermediate_size=768, num_labels=10)
    model = transformers.DeiTForImageClassification(config)
    # Its own are zero; the first gradients are then thousands of times as large.
    nn.init.trunc_normal_(model.deit.embeddings.position_embeddings, std=0.02)
    model.save_pretrained(student)
    mean, std = (list(timm.models.get_pretrained_cfg_value(MODEL, name)) for name in ("mean", "std"))
    size = {"height": image, "width": image}
    processor = transformers.DeiTImageProcessor(size=size, crop_size=size, image_mean=mean, image_std=std)
    processor.save_pretrained(student)


def table(done: dict[str, list[Done]]) -> str:
    lines = ["| | accuracy, % | seconds | CPU seconds | times faster |", "|---|---|---:|---:|---:|"]
    stock = next(iter(done.values()))
    for name, runs in done.items():
        ratio = median(a.wall / b.wall for a, b in zip(stock, runs, strict=True))
        accuracies = ", ".join(f"{each.accuracy:.1f}" for each in runs)
        wall, cpu = (median(getattr(each, what) for each in runs) for what in ("wall", "cpu"))
        lines.append(f"| {name} | {accuracies} | {wall:.0f} | {cpu:.0f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timm", help="timm's train.py")
    parser.add_argument("--transformers", help="transformers' run_image_classification.py")
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--work", type=Path, required=True, help="a new folder for images, models and outputs")
    args = parser.parse_args()
    args.work.mkdir(parents=True)
    write_folder(args.work / "digits")
    groups = {"timm": (ways_of_timm, args.timm), "transformers": (ways_of_transformers, args.transformers)}
    for group, (ways_of, script) in groups.items():
        if script is None:
            continue
        done: dict[str, list[Done]] = {}
        for seed in args.seeds:
            folders = [args.work / group / str(seed) / str(number) for number in range(3)]
            for way, folder in zip(
                ways_of(script, args.work, folders, args.image_size, args.epochs, seed), folders, strict=True
            ):
                done.setdefault(way.name, []).append(run(way, folder))
                print(f"seed {seed}, {way.name}: {done[way.name][-1]}", file=sys.stderr, flush=True)
        print(table(done), flush=True)


if __name__ == "__main__":
    main()
