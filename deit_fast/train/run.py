"""A training run: one loop over epochs and steps, which can be stopped anywhere and resumed bit for bit.

Everything drawn follows from the seed, the epoch and the step, so no generator's state is saved.
"""

import copy
import json
import math
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import broadcast_object_list
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from deit_fast.train import build
from deit_fast.train.checkpoints import Checkpoints, Saved, check_same
from deit_fast.train.evaluation import evaluate, right
from deit_fast.train.meter import Meter
from deit_fast.train.mixing import UNMIXED, draw
from deit_fast.train.pixels import ByteImages, Normalise
from deit_fast.train.reading import Batches
from deit_fast.train.recipe import Recipe
from deit_fast.train.samples import (
    Order,
    eval_transform,
    fingerprint,
    open_data,
    seed_draws,
    train_loader,
    train_transform,
    val_loader,
)
from deit_fast.train.sharding import OPTIMIZERS, gathered, in_parts
from deit_fast.train.teaching import read_classes, teacher_of

_DATA_PARALLEL = (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
# Gets the step, the number of steps, and what the log has of it.
OnLog = Callable[[int, int, dict[str, Any]], None]


@dataclass(frozen=True)
class Job:
    """Where and how a recipe is run; the options of `deit-fast train` say what each is."""

    data_path: str
    output_dir: str
    data_set: str = ""
    nb_classes: int | None = None
    teacher: str | None = None
    teacher_classes: str | None = None
    teacher_logits: str | None = None
    teacher_compile: bool = False
    resume: str | None = None
    num_workers: int = 4
    max_corrupt: float = 0.01
    cpu: bool = False
    mixed_precision: str = "no"
    grad_accum_steps: int = 1
    compile: bool = False
    memory: str = "balanced"
    swap: bool = True
    save_every: int | None = None
    keep: int = 2
    log_every: int = 50
    log_with: Sequence[str] = ()


class Run:
    """A recipe on its way: everything is made, and what is wrong with it refused, before the first step.

    Raises:
        ValueError, FileNotFoundError: as `deit_fast.train.recipe`, `samples` and `build` do; checkpoints in the way,
            or of another run.
    """

    def __init__(self, recipe: Recipe, job: Job):
        refuse(recipe, job)
        self.recipe, self.job = recipe, job
        self.checkpoints = Checkpoints(Path(job.output_dir), job.keep)
        # Its own accumulation, of which `accelerate launch` may have another idea, is not used.
        accelerator = Accelerator(
            cpu=job.cpu,
            mixed_precision=job.mixed_precision,
            gradient_accumulation_steps=1,
            log_with=list(job.log_with) or None,
            project_dir=job.output_dir,
        )
        _refuse_parallel(recipe, job, accelerator)
        self.accelerator = accelerator
        with accelerator.main_process_first():  # which sets aside what can't be read
            saved = self._saved()
        weights = build.weights_of(recipe) if saved is None else None
        data = open_data(job.data_path, job.data_set, job.nb_classes)

        seed_draws("weights", recipe.seed)
        self.model = build.model_of(recipe, data.num_classes, weights).to(accelerator.device)
        if job.swap:
            build.swap_known(self.model, job.memory)
        self.trained = build.trained_of(recipe, self.model).to(accelerator.device)
        self.data_config = data_config = build.data_config_of(recipe, self.model)
        images = fingerprint(data, job.data_set, job.data_path)
        self.teacher = teacher_of(recipe, job, data.num_classes, images, data_config, accelerator)
        self.criterion = build.loss_of(recipe, self.teacher)
        self.mixup = build.mixup_of(recipe, data.num_classes)
        # The teacher scales the images to its own mean, and masked ones are compared with: in float32.
        narrow = self.teacher is None and not recipe.masks
        dtype = build.images_dtype_of(self.model, job.mixed_precision) if narrow else torch.float32
        self.normalise = Normalise(data_config, accelerator.device, dtype)
        self.ema = ModelEmaV3(self.model, recipe.model_ema_decay) if recipe.model_ema else None

        ranks, rank = accelerator.num_processes, accelerator.process_index
        self.batch_size = recipe.batch_size * ranks
        self.parts = range(rank * job.grad_accum_steps, (rank + 1) * job.grad_accum_steps)
        samples = len(data.train)
        order = (samples, self.batch_size, recipe.seed, recipe.repeated_aug, ranks * job.grad_accum_steps, self.parts)
        self.order = Order(*order)
        self.steps = recipe.epochs * self.order.steps
        self.loader = train_loader(data, self.order, recipe, data_config, job.num_workers, job.max_corrupt)
        shown = eval_transform(data_config)
        mine = range(rank, len(data.val), ranks)
        self.val_loader = val_loader(data.val, shown, recipe.batch_size, mine, job.num_workers, job.max_corrupt)

        # What a checkpoint of this very run has, too.
        same = ("swap", "mixed_precision", "grad_accum_steps", "compile", "teacher_compile")
        self.identity = {
            **asdict(recipe),
            **{name: getattr(job, name) for name in same},
            "images": images,
            "teacher": self.teacher.digest if self.teacher is not None else None,
            "processes": ranks,
            "sharded": accelerator.is_fsdp2 or None,  # as in checkpoints that know nothing of it
        }
        self.step, self.evaluated = 0, True
        self.saved: int | None = None  # the last step of which there is a checkpoint
        # Score and step: of all so far, and of those in checkpoints.
        self.best: tuple[float, int] | None = None
        self.best_saved: tuple[float, int] | None = None
        if saved is not None:
            self._load(saved)

        self.as_saved, self.blank = self.model, None
        if accelerator.is_fsdp2:
            # Gets the weights when they are saved.
            self.as_saved = copy.deepcopy(self.model).to("meta")
            # For the process that has no batch left: a call is of all processes, and not every model takes no images.
            self.blank = ByteImages(torch.zeros(1, *data_config["input_size"], dtype=torch.uint8))
            # Accelerate's way fails where a model has parameters of its own, and each process has the weights anyway.
            accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
        self.compiled = torch.compile(self.trained) if job.compile else self.trained
        optimizer = build.optimizer_of(recipe, self.trained, self.batch_size)
        self.schedule = build.schedule_of(recipe, optimizer)
        self.wrapped, self.optimizer = accelerator.prepare(self.compiled, optimizer)
        if saved is not None:
            state = saved.state["optimizer"]
            self.optimizer.load_state_dict(in_parts(state, self.optimizer) if accelerator.is_fsdp2 else state)

    # -- the loop

    def train(self, on_log: OnLog | None = None) -> bool:
        """Train to the end, or until SIGTERM: False, with a checkpoint.

        Raises:
            FloatingPointError: a loss or a weight is not finite; the message names the checkpoint that is kept.
            OSError: the last checkpoint can't be written, or the first after a resume from another folder; others that
                can't are warnings. More images are corrupt than `max_corrupt` allows, or the file system keeps failing.
        """
        self.on_log = on_log
        config = asdict(self.recipe) | asdict(self.job)
        plain = (bool, int, float, str)  # what every tracker takes
        config = {name: value if isinstance(value, plain) else str(value) for name, value in config.items()}
        self.accelerator.init_trackers("deit-fast", config)
        try:
            with _sigterm() as self.asked:
                finished = self._epochs()
        finally:
            self._track(lambda tracker: tracker.finish())
        # Not after an error here: the other processes may be in a collective call.
        self.accelerator.state.destroy_process_group()
        return finished

    def _epochs(self) -> bool:
        if self.step and self.saved is None:  # resumed from elsewhere
            self._save(must=True)
        while self.step < self.steps or not self.evaluated:
            if self._epoch():
                self._save(must=True)
                return False
            self._save(must=self.step == self.steps)
        return True

    def _epoch(self) -> bool:
        """The rest of an epoch, and its evaluation; True where it has been told to stop."""
        epoch, start = divmod(self.step, self.order.steps)
        if start == 0 and not self.evaluated:
            epoch, start = epoch - 1, self.order.steps
        self.order.epoch, self.order.start = epoch, start
        if self.schedule is not None:
            self.schedule.step(epoch)
        self.wrapped.train()
        if self.recipe.linear_probe:
            build.rest_backbone(self.model)
        meter = Meter(self.batch_size, self.accelerator, self.teacher)
        for step, parts in enumerate(meter.waiting(self.loader, len(self.parts)), start=start):
            meter.add(self._update(epoch, step, parts))
            self.step, self.evaluated = self.step + 1, False
            last = step == self.order.steps - 1
            if self.step % self.job.log_every == 0 or last:
                record = meter.read(self.steps - self.step)
                if not math.isfinite(record["loss"]):
                    raise FloatingPointError(f"a loss is {record['loss']} at step {self.step}; {self._kept()}")
                self._log({"epoch": epoch, "lr": max(group["lr"] for group in self.optimizer.param_groups), **record})
                self._log_corrupt(self.loader, "train")
                self.loader.check()
            if self._stopping():
                return True
            if self.job.save_every and self.step % self.job.save_every == 0 and not last:
                self._save()
        if self.saved != self.step:
            self._save()  # whatever becomes of the evaluation
        averaged = [self.ema.module] if self.ema is not None else []
        # Not `wrapped`, whose calls are of all processes at once: one may have a batch more.
        for model in (self.compiled, *averaged):
            seed_draws("evaluation", self.recipe.seed)  # masks, the same after each epoch
            evaluation = evaluate(model, self.val_loader, self.normalise, self.accelerator, self._stopping, self.blank)
            if evaluation is None:
                return True
            self._log_corrupt(self.val_loader, "val")
            self.val_loader.check()
            ema = model is not self.compiled
            self._log({"epoch": epoch, "ema": ema, "val_loss": evaluation.loss, "val_accuracy": evaluation.accuracy})
            score = -evaluation.loss if self.recipe.masks else evaluation.accuracy
        self.evaluated = True
        # The average's score, where there is one.
        if self.best is None or score > self.best[0]:
            self.best = score, self.step
        return False

    def _update(self, epoch: int, step: int, parts: Iterable[tuple[ByteImages, Tensor]]) -> Tensor:
        """One step of the optimizer; its loss, and the share of images whose likeliest class is right."""
        accelerator, seed, of = self.accelerator, self.recipe.seed, len(self.parts)
        seen = torch.zeros(2, device=accelerator.device)
        for part, (byte_images, targets) in zip(self.parts, parts, strict=True):
            targets = targets.to(accelerator.device, non_blocking=True)
            mix = UNMIXED
            if self.mixup is not None:
                seed_draws("mixup", seed, epoch, step)  # the same for every part of the batch
                targets, mix = draw(self.mixup, byte_images.images.shape, targets)
            images = self.normalise(byte_images, mix)
            seed_draws("step", seed, epoch, step, part)
            with nullcontext() if part == self.parts[-1] else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    if self.teacher is not None:
                        self.teacher.begin(images, (epoch, step, part))
                    outputs = self.wrapped(images)
                    loss = self.criterion(images, outputs, targets)
                accelerator.backward(loss / of)
            logits = outputs[0] if isinstance(outputs, tuple) else outputs
            classes = targets.argmax(-1) if targets.ndim > 1 else targets
            seen += torch.stack([loss.detach().float(), right(logits, classes).float().mean()]) / of
        if self.recipe.clip_grad is not None:
            accelerator.clip_grad_norm_(self.trained.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step + 1)
        return seen

    def _stopping(self) -> bool:
        """Whether any process has been asked to."""
        if self.accelerator.num_processes == 1:
            return bool(self.asked)
        if self.asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    # -- files

    def _saved(self) -> Saved | None:
        resume, there = self.job.resume, self.checkpoints.steps()
        if resume is None and there:
            raise ValueError(f"{self.job.output_dir} has checkpoints: --resume auto goes on from them")
        if resume is None or resume == "auto":
            return self.checkpoints.latest()
        saved = Saved(Path(resume))
        if there and there[-1] > saved.state["step"]:
            newest = self.checkpoints.path(there[-1])
            raise ValueError(f"{newest} is newer than {resume}: give another --output-dir, or remove what is newer")
        return saved

    def _load(self, saved: Saved) -> None:
        state = saved.state
        check_same(saved.folder, state["identity"], self.identity)
        self.model.load_state_dict(saved.weights)
        self.trained.load_state_dict(state["filling"], strict=False)
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.ema)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.evaluated = state["step"], state["evaluated"]
        there = self.checkpoints.steps()
        if saved.folder.resolve() == self.checkpoints.path(self.step).resolve():
            self.saved = self.step
        # One that is here, as this step soon is.
        if state["best"] is not None and state["best"][1] in (*there, self.step):
            score, step = state["best"]
            self.best = self.best_saved = score, step
        self.loader.corrupt = state["corrupt"]

    def _save(self, must: bool = False) -> None:
        """A checkpoint of this step; where there is one already, what has changed since."""
        if not all(bool(gathered(parameter.isfinite().all())) for parameter in self.trained.parameters()):
            raise FloatingPointError(f"the weights are not finite after step {self.step}; {self._kept()}")
        self._log_corrupt(self.loader, "train")
        if self.teacher is not None and self.teacher.cache is not None:
            self.teacher.cache.flush()
        best = self.best[1] if self.best else None
        amends = self.saved == self.step
        if amends:
            changed = {"evaluated": self.evaluated, "best": self.best}
            failed = self._failure(lambda: self.checkpoints.amend(self.step, changed, best))
        else:
            state, ema = self._state(), self.ema.module if self.ema is not None else None
            to_save = self.step, self.as_saved, ema, self.data_config, state, best
            failed = self._failure(lambda: self.checkpoints.save(*to_save))
        if failed is not None and not amends:
            self.best = self.best_saved  # it may have been this step
        self.best_saved = self.best
        if failed is None:
            self.saved = self.step
            return
        if must:
            raise OSError(f"{failed}; {self._kept()}")
        warnings.warn(f"{failed}; training goes on, and {self._kept()}", stacklevel=2)

    def _state(self) -> dict[str, Any]:
        """Of the run, for a checkpoint. Of a sharded model `as_saved` gets the weights, too."""
        main = self.accelerator.is_main_process
        if self.accelerator.is_fsdp2:
            weights = gathered(self.model.state_dict(), keep=main)
            if main:
                self.as_saved.load_state_dict(weights, assign=True)
        return {
            "identity": self.identity,
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "filling": gathered(self._filling(), keep=main),
            "corrupt": self.loader.corrupt,
            "optimizer": gathered(self.optimizer.state_dict(), keep=main),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }

    def _failure(self, write: Callable[[], None]) -> str | None:
        """Let the main process write; what all are told of its failure."""
        failed: list[str | None] = [None]
        if self.accelerator.is_main_process:
            try:
                write()
            except OSError as error:
                failed = [str(error)]
        broadcast_object_list(failed)
        return failed[0]

    def _filling(self) -> dict[str, Tensor]:
        """What masked image modelling trains beside the model."""
        weights = self.trained.state_dict().items() if self.recipe.masks else ()
        return {name: tensor for name, tensor in weights if not name.startswith("encoder.")}

    def _kept(self) -> str:
        steps = self.checkpoints.steps()
        return f"{self.checkpoints.path(steps[-1])} is kept" if steps else "there is no checkpoint yet"

    def _log_corrupt(self, batches: Batches, split: str) -> None:
        corrupt = batches.gather()
        if corrupt:
            self._log({"split": split, "corrupt": corrupt})

    def _log(self, record: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        record = {"step": self.step, **record}
        if self.recipe.masks:  # there are no classes
            record = {name: value for name, value in record.items() if not name.endswith("accuracy")}
        try:
            with (self.checkpoints.folder / "log.jsonl").open("ab+") as file:
                file.seek(-min(1, file.tell()), os.SEEK_END)
                cut = file.read() not in (b"", b"\n")  # by a kill, or a full disk
                file.write(("\n" * cut + json.dumps(record) + "\n").encode())
        except OSError as error:
            warnings.warn(f"the log could not be written: {error}", stacklevel=2)
        of = "ema_" if record.get("ema") else ""
        numbers = {of + name: value for name, value in record.items() if isinstance(value, float)}
        if numbers:
            self._track(lambda tracker: tracker.log(numbers, step=self.step))
        if self.on_log is not None:
            self.on_log(self.step, self.steps, record)

    def _track(self, call: Callable[[GeneralTracker], None]) -> None:
        """Call each tracker; its errors are warnings."""
        for tracker in self.accelerator.trackers:
            try:
                call(tracker)
            except Exception as error:  # of any library, say for a full disk or a network
                warnings.warn(f"the tracker {tracker.name} failed: {error}", stacklevel=2)


def refuse(recipe: Recipe, job: Job) -> None:
    """Whatever can be known to be wrong before data is looked at.

    Raises:
        ValueError: it is.
    """
    if recipe.distils and job.teacher is None:
        raise ValueError(f"distillation_type {recipe.distillation_type} needs --teacher")
    if job.teacher is not None and not recipe.distils:
        raise ValueError("a teacher is given, and distillation_type is none: make it soft or hard")
    for name in ("teacher_classes", "teacher_logits", "teacher_compile"):
        if getattr(job, name) and job.teacher is None:
            raise ValueError(f"--{name.replace('_', '-')} is given, and would change nothing without --teacher")
    if job.teacher_classes is not None:
        read_classes(job.teacher_classes)
    parts = job.grad_accum_steps
    # Even ones, as mixup needs them.
    if parts < 1 or recipe.batch_size % (2 * parts if parts > 1 or recipe.mixes else 1):
        raise ValueError(f"a batch of {recipe.batch_size} can't be cut into {parts} parts of an even number of images")
    if parts > 1 and recipe.mixes and recipe.mixup_mode != "batch":
        raise ValueError(f"mixup_mode {recipe.mixup_mode} draws for each image: not with parts of a batch")
    if job.mixed_precision == "fp16" and (job.cpu or not torch.accelerator.is_available()):
        raise ValueError("mixed precision in fp16 needs a GPU; bf16 does not")
    if job.memory != "balanced" and not job.swap:
        raise ValueError("memory is of swapped models, and none is to be swapped")
    for name in ("keep", "log_every", "save_every"):
        value = getattr(job, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in job.log_with:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"--log-with takes {', '.join(LOGGER_TYPE_TO_CLASS)}, not {name}")
        if name not in map(str, get_available_trackers()):
            raise ValueError(f"--log-with {name} needs its library: pip install {name}")
    if not 0 <= job.max_corrupt <= 1:
        raise ValueError(f"max_corrupt must be from 0 to 1, got {job.max_corrupt}")
    with torch.device("meta"):
        model = build.model_of(recipe, num_classes=2)
    build.schedule_of(recipe, build.optimizer_of(recipe, build.trained_of(recipe, model), 1))
    try:
        train_transform(recipe, build.data_config_of(recipe, model))
    except (AssertionError, KeyError, AttributeError) as error:
        raise ValueError(f"timm can't make the augmentation aa={recipe.aa}, remode={recipe.remode}: {error}") from error
    Path(job.output_dir).mkdir(parents=True, exist_ok=True)


def _refuse_parallel(recipe: Recipe, job: Job, accelerator: Accelerator) -> None:
    if accelerator.is_fsdp2:
        if recipe.model_ema:
            raise ValueError("model_ema: a model that FSDP2 shards has no moving average here")
        if job.compile:
            raise ValueError("--compile: a model that FSDP2 shards is not compiled here")
        if recipe.opt.lower() not in OPTIMIZERS:
            raise ValueError(f"a model that FSDP2 shards is trained with {', '.join(OPTIMIZERS)}, not {recipe.opt}")
        with torch.device("meta"):
            model = build.model_of(recipe, num_classes=2)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            raise ValueError(f"{recipe.model} has BatchNorm: with FSDP2 its statistics would differ between processes")
    elif accelerator.distributed_type not in (DistributedType.NO, *_DATA_PARALLEL):
        kind = accelerator.distributed_type.value
        raise ValueError(f"deit-fast train runs under DistributedDataParallel and FSDP2 (fsdp_version 2), not {kind}")


@contextmanager
def _sigterm() -> Iterator[list[bool]]:
    """A list that is no longer empty once the process has been asked to end."""
    asked: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
