"""A training run on small digits: it learns, and stopped, killed or short of disk it ends where it would have."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate import tracking
from timm.data import Mixup, create_transform
from torch.utils.data import default_collate

from deit_fast.train import build, checkpoints, digits, recipe
from deit_fast.train import run as runs
from deit_fast.train.evaluation import Evaluation, evaluate
from deit_fast.train.pixels import ByteImages
from deit_fast.train.run import Job, Run
from tests.train.test_samples import folders
from tests.train.test_shards import write

SMALL = {"patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 1}
STUDENT = "deit_tiny_distilled_patch16_224"
EPOCHS, BATCH = 3, 32


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of scikit-learn's digits as folders."""
    root = tmp_path_factory.mktemp("digits")
    digits.write_folder(root, most=160)
    return root


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained convolutional network as timm saves it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10), str(folder), safe_serialization=True)
    return folder


def small(**given) -> recipe.Recipe:
    """The whole recipe of DeiT, at a small size."""
    values = {"epochs": EPOCHS, "warmup_epochs": 1, "batch_size": BATCH, "input_size": 16, "lr": 1e-2}
    return recipe.load(**({"model": STUDENT, "model_kwargs": SMALL, "model_ema": True} | values | given))


def job(images: Path, out: Path, **given) -> Job:
    values = {"num_workers": 0, "cpu": True, "log_every": 2, "save_every": 2}
    return Job(str(images), str(out), **(values | given))


def assert_same_end(out: Path, other: Path, with_best: bool = True) -> None:
    """Both runs end with the same bits: weights, their average, the optimizer, the best."""
    for name in (checkpoints.WEIGHTS, f"{checkpoints.EMA}/{checkpoints.WEIGHTS}"):
        assert (newest(out) / name).read_bytes() == (newest(other) / name).read_bytes(), name
    ends = [checkpoints.Saved(newest(folder)).state for folder in (out, other)]
    torch.testing.assert_close(*(end.pop("optimizer")["state"] for end in ends), rtol=0, atol=0)
    for end in ends:
        end["identity"].pop("images")  # tar files have other names than folders
    best = [end.pop("best") for end in ends]
    assert ends[0] == ends[1]
    if not with_best:
        return
    assert best[0] == best[1]
    assert (out / "best").readlink() == (other / "best").readlink()


def starting(target: Callable, *arguments) -> multiprocessing.Process:
    context = multiprocessing.get_context("forkserver")  # which has imported, and computed nothing
    context.set_forkserver_preload([runs.__name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def newest(out: Path) -> Path:
    found = checkpoints.Checkpoints(out)
    return found.path(found.steps()[-1])


@pytest.fixture(scope="session")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert Run(small(), job(images, out)).train()
    return out


# -- learning


def test_a_student_learns_from_a_teacher(images, teacher, tmp_path):
    plain = {"mixup": 0, "cutmix": 0, "reprob": 0, "hflip": 0, "aa": "none", "scale": (0.8, 1.0), "repeated_aug": False}
    made = small(
        **plain, distillation_type="hard", distillation_alpha=0.2, epochs=8, lr=0.1, smoothing=0.0, model_ema=False
    )
    run = Run(made, job(images, tmp_path, teacher=str(teacher)))
    assert run.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"] and steps[-1]["accuracy"] > 0.25
    assert steps[-1]["seconds_left"] == 0 and all(0 < record["waiting_for_teacher"] < 1 for record in steps)
    assert all(record["images_per_second"] > 0 and 0 < record["waiting_for_data"] < 1 for record in steps)
    assert [record["epoch"] for record in log if "val_accuracy" in record] == list(range(8))
    best = build.pretrained(str(tmp_path / "best"), num_classes=10)
    assert evaluate(best, run.val_loader, run.normalise, run.accelerator).accuracy == run.best[0]


def test_each_recipe_takes_its_steps(images, tmp_path):
    for name in recipe.recipes():
        deit3 = name.startswith("deit3")
        model = "deit3_small_patch16_224" if deit3 else STUDENT
        given = {"model": model, "model_kwargs": SMALL, "input_size": 16, "batch_size": BATCH, "epochs": 1}
        given |= {"mask_patch_size": 8} if name == "pretrain" else {}
        run = Run(recipe.load(name, **given, warmup_epochs=0), job(images, tmp_path / name, save_every=None))
        before = run.model.blocks[0].attn.qkv.weight.clone()
        assert run.train() and not torch.equal(before, run.model.blocks[0].attn.qkv.weight)
        assert run.optimizer.defaults.get("fused", False) is not deit3
        assert run.model.blocks[0].drop_path1.__class__.__name__ == ("DropPath" if deit3 else "Identity")


def test_parts_of_a_batch_teach_what_the_batch_does(images, tmp_path):
    weights = []
    for parts in (1, 2):
        # Drop path draws for each part anew; AdamW makes much of small gradients' rounding.
        made = small(drop_path=0.0, opt="sgd", opt_eps="none", lr=0.1, epochs=2)
        run = Run(made, job(images, tmp_path / str(parts), grad_accum_steps=parts))
        assert run.train()
        weights.append(torch.cat([parameter.flatten() for parameter in run.model.parameters()]))
    assert torch.allclose(*weights, rtol=0, atol=1e-5)


def test_what_was_pretrained_without_labels_is_finetuned(images, teacher, tmp_path):
    def pretraining(name: str, **given) -> Run:
        values = {"mask_patch_size": 8, "epochs": 4, "warmup_epochs": 0, "batch_size": BATCH, "input_size": 16}
        made = recipe.load("pretrain", model=STUDENT, model_kwargs=SMALL, lr=0.02, **values)
        return Run(made, job(images, tmp_path / name, **given))

    def stop(step, steps, record):
        if step == 8 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    assert pretraining("whole").train()
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in log if "val_loss" in record]
    assert losses[-1] < 0.95 * losses[0] and not any("accuracy" in name for record in log for name in record)
    run = pretraining("stopped")
    assert not run.train(stop) and pretraining("stopped", resume="auto").train()
    ends = [checkpoints.Saved(newest(tmp_path / name)) for name in ("whole", "stopped")]
    for part in ("weights", "filling", "optimizer", "best"):
        mine, other = (end.weights if part == "weights" else end.state[part] for end in ends)
        torch.testing.assert_close(mine, other, rtol=0, atol=0)

    # Both heads with a teacher, larger images, a smaller rate for the block than for the heads.
    values = {"finetune": str(tmp_path / "whole" / "best"), "distillation_type": "hard", "input_size": 32}
    made = recipe.load("finetune", epochs=1, warmup_epochs=0, batch_size=BATCH, layer_decay=0.5, lr=1e-3, **values)
    run = Run(made, job(images, tmp_path / "finetuned", teacher=str(teacher)))
    pretrained = ends[0].weights["blocks.0.attn.qkv.weight"]
    assert torch.equal(run.model.blocks[0].attn.qkv.weight, pretrained) and run.model.pos_embed.shape[1] == 2 + 16
    assert run.train() and not torch.equal(run.model.blocks[0].attn.qkv.weight, pretrained)


def of_floats(run: Run, monkeypatch) -> Run:
    """The run with images that timm and torchvision normalise, erase and mix in float32."""
    made, config = run.recipe, run.data_config
    mean_and_std = {name: config[name] for name in ("mean", "std")}
    augmented = create_transform(
        config["input_size"], is_training=True, scale=made.scale, hflip=made.hflip,
        color_jitter=made.color_jitter or 0.0, auto_augment=made.aa, interpolation=made.train_interpolation,
        re_prob=made.reprob, re_mode=made.remode, re_count=made.recount, **mean_and_std,
    )  # fmt: skip
    shown = create_transform(
        config["input_size"], interpolation=config["interpolation"], crop_pct=config["crop_pct"], **mean_and_std
    )

    def collate(items):
        images, targets = default_collate([(image, target) for image, target, _ in items])
        return ByteImages(images), targets, {}

    for loader, transform in ((run.loader.loader, augmented), (run.val_loader.loader, shown)):
        loader.dataset.transform, loader.collate_fn = transform, collate

    def draw(mixup, shape, labels):
        before = np.random.get_state()
        _, targets = mixup(torch.zeros(shape), labels)
        np.random.set_state(before)
        return targets, mixup

    def normalise(byte_images, mix=None):
        return (
            mix(byte_images.images, torch.zeros(len(byte_images.images)))[0]
            if isinstance(mix, Mixup)
            else byte_images.images
        )

    monkeypatch.setattr(runs, "draw", draw)
    run.normalise = normalise
    return run


@pytest.mark.parametrize(
    ("given", "of_job"),
    [
        ({}, {}),
        ({"reprob": 1.0, "recount": 3, "mixup_mode": "elem"}, {"num_workers": 1}),
        ({"reprob": 0.0, "mixup": 0, "cutmix": 0}, {}),
    ],
    ids=["DeiT's", "for each image", "unmixed"],
)
def test_images_that_travel_as_bytes_end_in_the_bits_of_those_normalised_at_once(
    images, tmp_path, monkeypatch, given, of_job
):
    of_bytes, floats = (
        Run(small(epochs=1, warmup_epochs=0, **given), job(images, tmp_path / name, **of_job))
        for name in ("bytes", "floats")
    )
    assert of_bytes.train() and of_floats(floats, monkeypatch).train()
    assert_same_end(tmp_path / "bytes", tmp_path / "floats")
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("bytes", "floats")]
    losses = [[{k: v for k, v in json.loads(line).items() if "loss" in k} for line in log] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) > 2


def test_a_linear_probe_resumes_bit_for_bit(images, uninterrupted, tmp_path):
    def probing(name: str, **given) -> Run:
        values = {"finetune": str(uninterrupted / "best"), "linear_probe": True, "lr": 1e-2, "model_ema": True}
        made = recipe.load("finetune", epochs=2, warmup_epochs=0, batch_size=BATCH, **values)
        return Run(made, job(images, tmp_path / name, **given))

    run = probing("whole")
    before = run.model.blocks[0].attn.qkv.weight.clone()
    assert run.train() and torch.equal(run.model.blocks[0].attn.qkv.weight, before)
    assert not probing("stopped").train(lambda step, *_: os.kill(os.getpid(), signal.SIGTERM) if step == 4 else None)
    assert probing("stopped", resume="auto").train()
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def _train_one_of_two(images: Path, out: Path, rank: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Run(without_drop_path(batch_size=BATCH // 2), job(images, out, log_every=1, save_every=None)).train()


def without_drop_path(**given) -> recipe.Recipe:
    """Each process would draw it for itself."""
    return small(drop_path=0.0, epochs=2, **given)


def test_two_processes_lose_what_one_loses(images, tmp_path):
    """With the environment that torchrun makes, in float32; one has a batch more to be evaluated on."""
    images = Path(shutil.copytree(images, tmp_path / "images"))
    for file in sorted((images / "val").rglob("*.png"))[33:]:
        file.unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [starting(_train_one_of_two, images, tmp_path / "two", rank, port) for rank in range(2)]
    assert Run(without_drop_path(), job(images, tmp_path / "one", log_every=1, save_every=None)).train()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("one", "two")]
    losses = [[record.get("loss", record.get("val_loss")) for record in map(json.loads, log)] for log in logs]
    assert len(losses[0]) == 2 * (5 + 2) and losses[1] == pytest.approx(losses[0], rel=0, abs=1e-3)


# -- the end is the same


def test_more_workers_change_nothing(images, uninterrupted, tmp_path):
    assert Run(small(), job(images, tmp_path, num_workers=2)).train()
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("numbered", [False, True])
def test_tar_files_of_the_same_order_end_as_the_folders(images, uninterrupted, tmp_path, numbered):
    for split in ("train", "val"):
        files = {}
        for file in sorted((images / split).rglob("*.png")):
            label, key = file.parts[-2:]
            files[f"{label}-{key}" if numbered else f"{label}/{key}"] = file.read_bytes()
            if numbered:
                files[f"{label}-{key}".replace(".png", ".cls")] = label.encode()
        write(tmp_path / "tars" / f"{split}.tar", files)
    assert Run(small(), job(tmp_path / "tars", tmp_path / "out")).train()
    assert_same_end(tmp_path / "out", uninterrupted)


def test_corrupt_images_are_named_once_and_resumed_past(images, tmp_path):
    """With workers, without, and stopped in between: the same end, and the same names in the log."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    for split, most in (("train", 5), ("val", 2)):
        for file in sorted((root / split).rglob("*.png"))[10 : 10 + most]:
            file.write_bytes(file.read_bytes()[:60])

    def named(out: Path, split: str) -> list[str]:
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return sorted(name for record in log if record.get("split") == split for name in record["corrupt"])

    def stop(step, steps, record):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert Run(small(), job(root, whole, max_corrupt=0.04)).train()
    assert not Run(small(), job(root, parts, max_corrupt=0.04, log_every=1)).train(stop)
    assert Run(small(), job(root, parts, max_corrupt=0.04, resume="auto", num_workers=2)).train()
    assert_same_end(whole, parts)
    corrupt = checkpoints.Saved(newest(whole)).state["corrupt"]
    assert 0 < len(corrupt) <= 5 and named(whole, "train") == named(parts, "train") == sorted(corrupt)
    assert len(named(whole, "val")) == 2
    with pytest.raises(OSError, match=r"[1-5] of 160 images can't be read, .* cannot be decoded"):
        Run(small(), job(root, tmp_path / "none", max_corrupt=0)).train()


def test_an_evaluation_that_fails_loses_no_epoch(images, uninterrupted, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "images"))
    for file in (root / "val").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(OSError, match="images can't be read"):
        Run(small(), job(root, tmp_path / "out", save_every=None)).train()
    assert checkpoints.Checkpoints(tmp_path / "out").steps() == [5]
    shutil.copytree(images / "val", root / "val", dirs_exist_ok=True)
    run = Run(small(), job(root, tmp_path / "out", resume="auto"))
    assert run.step == 5 and run.best is None and run.train()
    assert_same_end(tmp_path / "out", uninterrupted)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in log if record.get("ema")] == list(range(EPOCHS))


@pytest.mark.parametrize("at", [1, 4, 5, 6])
def test_sigterm_saves_and_the_run_goes_on_from_there(images, uninterrupted, tmp_path, at):
    """At a step, and at the evaluation after the last of an epoch, of five steps."""

    def stop(step, steps, record):
        if step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    run = Run(small(), job(images, tmp_path, log_every=1))
    assert not run.train(stop) and run.step == at
    assert checkpoints.Checkpoints(tmp_path).steps()[-1] == at
    again = Run(small(), job(images, tmp_path, resume="auto"))
    assert again.step == at and again.train()
    assert_same_end(tmp_path, uninterrupted)


def _train(images: Path, out: Path, workers: int, start_method: str) -> None:
    os.setsid()
    multiprocessing.set_start_method(start_method, force=True)
    torch.set_num_threads(1)
    Run(small(), job(images, out, save_every=1, log_every=1, resume="auto", num_workers=workers)).train()


def ended(
    images: Path,
    out: Path,
    by: int,
    delay: float = 0.0,
    in_a_save: bool = False,
    workers: int = 0,
    start_method: str = "fork",
) -> int:
    """Train in a group of processes, send them a signal `delay` seconds after a step, and return the exit code."""
    log, before = out / "log.jsonl", time.time()
    process = starting(_train, images, out, workers, start_method)
    while process.is_alive() and not (log.exists() and log.stat().st_mtime > before):
        time.sleep(0.001)
    time.sleep(delay)
    while process.is_alive() and in_a_save and not list(out.glob(f"*{checkpoints.PARTIAL}")):
        pass
    os.killpg(process.pid, by)
    process.join()
    return process.exitcode


def test_a_killed_run_ends_as_the_uninterrupted_one(images, uninterrupted, tmp_path):
    """Once at some moment, once in a save."""
    for delay, in_a_save in ((0.1, False), (0.0, True)):
        assert ended(images, tmp_path, signal.SIGKILL, delay, in_a_save) == -signal.SIGKILL
    assert max(checkpoints.Checkpoints(tmp_path).steps(), default=0) < EPOCHS * 5
    Run(small(), job(images, tmp_path, resume="auto")).train()
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_sigterm_to_the_whole_group_saves(images, uninterrupted, tmp_path, start_method):
    """To the workers too, and to the server that forks them."""
    assert ended(images, tmp_path, signal.SIGTERM, workers=2, start_method=start_method) == 0
    assert 0 < checkpoints.Checkpoints(tmp_path).steps()[-1] < EPOCHS * 5
    Run(small(), job(images, tmp_path, resume="auto")).train()
    assert_same_end(tmp_path, uninterrupted)


def test_a_full_disk_stops_nothing_and_loses_nothing(images, uninterrupted, tmp_path, monkeypatch):
    save, saves = torch.save, []

    def full_for_a_while(state, path):
        saves.append(state["step"])
        if 2 <= len(saves) <= 4:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_for_a_while)
    with pytest.warns(UserWarning, match="No space left on device; training goes on, and .*step-00000002 is kept"):
        assert Run(small(), job(images, tmp_path)).train()
    assert_same_end(tmp_path, uninterrupted, with_best=False)  # the first best was not saved


def test_the_best_is_one_that_was_saved(images, tmp_path, monkeypatch):
    accuracies, saves, save = iter([0.1, 0.9, 0.2]), [], torch.save

    def full_for_an_epoch(state, path):
        saves.append(None)
        if len(saves) in (2, 3):  # before the second evaluation and after it
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full_for_an_epoch)
    monkeypatch.setattr(runs, "evaluate", lambda *_: Evaluation(1.0, next(accuracies)))
    run = Run(small(model_ema=False), job(images, tmp_path, save_every=None, keep=1))
    with pytest.warns(UserWarning, match="No space left on device; training goes on, and .*step-00000005 is kept"):
        assert run.train()
    assert run.best == (0.2, 15) and (tmp_path / "best").readlink() == Path("step-00000015")
    with pytest.raises(ValueError, match=r"step-00000015 is newer than .*: give another --output-dir"):
        older = shutil.copytree(newest(tmp_path), tmp_path / "older")
        state = torch.load(older / checkpoints.STATE)
        save({**state, "step": 10}, older / checkpoints.STATE)
        Run(small(model_ema=False), job(images, tmp_path, resume=str(older)))


def test_a_best_whose_score_was_not_written_is_still_the_best(images, tmp_path, monkeypatch):
    accuracies, amended, write = iter([0.9, 0.1, 0.2]), [], Path.write_text

    def full_once(path, text):
        if path.name.startswith(checkpoints.AMENDED):
            amended.append(path)
            if len(amended) == 1:
                raise OSError(28, "No space left on device")
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", full_once)
    monkeypatch.setattr(runs, "evaluate", lambda *_: Evaluation(1.0, next(accuracies)))
    run = Run(small(model_ema=False), job(images, tmp_path, save_every=None, keep=1))
    with pytest.warns(UserWarning, match="No space left on device; training goes on, and .*step-00000005 is kept"):
        assert run.train()
    assert run.best == (0.9, 5) and (tmp_path / "best").readlink() == Path("step-00000005")
    assert checkpoints.Saved(tmp_path / "best").state["step"] == 5
    assert tuple(checkpoints.Saved(newest(tmp_path)).state["best"]) == run.best


def test_a_broken_checkpoint_is_mended_by_a_resume_from_its_copy(images, uninterrupted, tmp_path):
    copy = Path(shutil.copytree(newest(uninterrupted), tmp_path / "copy"))
    out = Path(shutil.copytree(uninterrupted, tmp_path / "out", symlinks=True))
    (newest(out) / checkpoints.WEIGHTS).write_bytes(b"")
    run = Run(small(), job(images, out, resume=str(copy)))
    assert run.train()
    assert_same_end(out, uninterrupted, with_best=False)
    assert list(run.best) == checkpoints.Saved(copy).state["best"]
    assert (out / "best").readlink() == (uninterrupted / "best").readlink()


def test_a_line_of_the_log_that_was_cut_short_stays_apart(images, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "lo')
    assert Run(small(epochs=2), job(images, tmp_path)).train()
    cut, *lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert cut == '{"step": 1, "lo' and all(json.loads(line)["step"] for line in lines)


class _Noted(tracking.GeneralTracker):
    """In TensorBoard's place, which need not be installed."""

    name, requires_logging_directory, tracker = "tensorboard", True, None
    config: dict
    seen: list

    def __init__(self, project, folder):
        super().__init__()
        self.folder = folder

    def store_init_configuration(self, values):
        type(self).config = {**values, "folder": self.folder}

    def log(self, values, step):
        type(self).seen += [{"step": step, **values}]

    def finish(self):
        type(self).seen += ["finished"]


def track_with(tracker: type[_Noted], monkeypatch) -> None:
    for module in (tracking, runs):
        monkeypatch.setattr(module, "get_available_trackers", lambda: [tracking.LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", tracker)
    tracker.seen = []


def test_a_tracker_gets_the_numbers_of_the_log_on_one_axis_of_steps(images, tmp_path, monkeypatch):
    track_with(_Noted, monkeypatch)

    def stop(step, steps, record):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    assert not Run(small(), job(images, tmp_path, log_with=["tensorboard"])).train(stop)
    assert Run(small(), job(images, tmp_path, log_with=["tensorboard"], resume="auto")).train()
    assert _Noted.config["lr"] == 1e-2 and _Noted.config["scale"] == "(0.08, 1.0)"
    assert _Noted.config["folder"] == _Noted.config["output_dir"] == str(tmp_path)
    logged = []
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["epoch"]
        ema = "ema_" if record.pop("ema", False) else ""
        logged.append({name if name == "step" else ema + name: value for name, value in record.items()})
    assert _Noted.seen.count("finished") == 2 and _Noted.seen[-1] == "finished"
    assert [record for record in _Noted.seen if record != "finished"] == logged and "ema_val_accuracy" in logged[-1]


class _Refusing(_Noted):
    """With no way to where the numbers go."""

    def log(self, values, step):
        raise ConnectionError("no route to host")

    def finish(self):
        super().finish()
        raise ConnectionError("no route to host")


def test_an_error_of_a_tracker_ends_no_training(images, tmp_path, monkeypatch):
    track_with(_Refusing, monkeypatch)
    with pytest.warns(UserWarning, match="the tracker tensorboard failed: no route to host"):
        assert Run(small(epochs=1, warmup_epochs=0), job(images, tmp_path, log_with=["tensorboard"])).train()
    assert _Refusing.seen == ["finished"]


def test_a_run_that_fails_finishes_its_trackers(images, tmp_path, monkeypatch):
    track_with(_Refusing, monkeypatch)
    run = Run(small(), job(images, tmp_path, log_with=["tensorboard"]))
    run.criterion = lambda *_: 1 / 0
    with pytest.warns(UserWarning, match="the tracker"), pytest.raises(ZeroDivisionError):
        run.train()
    assert _Refusing.seen == ["finished"]


def test_a_disk_that_stays_full_is_an_error_that_names_what_is_kept(images, tmp_path, monkeypatch):
    save = torch.save

    def full(state, path):
        if state["step"] > 2:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="step-00000002 is kept"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Run(small(), job(images, tmp_path)).train()
    assert checkpoints.Checkpoints(tmp_path).steps() == [2]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(images, tmp_path):
    run = Run(small(), job(images, tmp_path, log_every=100))

    def broken(*arguments):
        return float("nan") * build.loss_of(run.recipe, None)(*arguments)

    sound = run.criterion
    run.criterion = lambda *arguments: (broken if run.step >= 3 else sound)(*arguments)
    with pytest.raises(FloatingPointError, match=r"step-00000002 is kept"):
        run.train()
    assert checkpoints.Checkpoints(tmp_path).steps() == [2]


# -- refused


def untouched(*_, **__):
    pytest.fail("data was opened")


@pytest.mark.parametrize(
    ("given", "of_job", "message"),
    [
        ({"distillation_type": "hard"}, {}, "needs --teacher"),
        ({}, {"teacher": "test_resnet"}, "distillation_type is none"),
        ({}, {"teacher_logits": "kept"}, "--teacher-logits is given, and would change nothing without --teacher"),
        ({}, {"teacher_compile": True}, "--teacher-compile is given, and would change nothing"),
        ({"distillation_type": "hard"}, {"teacher": "test_resnet", "teacher_classes": __file__}, "whole numbers"),
        ({"distillation_type": "hard", "model": "test_vit"}, {"teacher": "test_resnet"}, "test_vit has one head"),
        ({"model": "deit_gigantic"}, {}, "can't make the model deit_gigantic"),
        ({"model_kwargs": {"dept": 3}}, {}, "can't make the model"),
        ({"opt": "adamv"}, {}, "can't make the optimizer adamv"),
        ({"aa": "rnd-m9"}, {}, "can't make the augmentation"),
        ({}, {"grad_accum_steps": 5}, "can't be cut into 5"),
        ({}, {"keep": 0}, "keep must be at least 1"),
        ({}, {"log_with": ["paper"]}, "--log-with takes .*tensorboard, .*, not paper"),
        ({}, {"log_with": ["tensorboard"]}, "--log-with tensorboard needs its library: pip install tensorboard"),
        ({}, {"save_every": 0}, "save_every must be at least 1"),
        ({}, {"max_corrupt": 1.5}, "max_corrupt must be from 0 to 1"),
        ({}, {"resume": "nowhere"}, "nowhere is no checkpoint"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_can_be_known_to_be_wrong_is_refused_before_data_is_touched(
    images, tmp_path, monkeypatch, given, of_job, message
):
    monkeypatch.setattr(runs, "open_data", untouched)
    monkeypatch.setattr(runs, "get_available_trackers", list)
    kwargs = {} if given.get("model") == "test_vit" else {"model_kwargs": SMALL}
    with pytest.raises(ValueError, match=message):
        Run(small(**(kwargs | given)), job(images, tmp_path, **of_job))


def test_checkpoints_in_the_way_or_of_another_run_are_refused(images, uninterrupted, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="has checkpoints: --resume auto"):
        patch.setattr(runs, "open_data", untouched)
        Run(small(), job(images, uninterrupted))
    with pytest.raises(ValueError, match=r"another run: its lr was 0.01, now it is 0.02"):
        Run(small(lr=2e-2), job(images, uninterrupted, resume="auto"))
    with pytest.raises(ValueError, match=r"its grad_accum_steps was 1, now it is 2"):
        Run(small(), job(images, uninterrupted, resume="auto", grad_accum_steps=2))
    step = newest(uninterrupted)
    assert Run(small(), job(images, uninterrupted, resume=str(step))).step == EPOCHS * 5


def test_a_teacher_of_other_classes_is_refused(teacher, tmp_path):
    made = small(distillation_type="soft", batch_size=2)
    three = folders(tmp_path / "three")
    with pytest.raises(ValueError, match="knows 10 classes, the images have 3"):
        Run(made, replace(job(three, tmp_path / "out"), teacher=str(teacher)))
