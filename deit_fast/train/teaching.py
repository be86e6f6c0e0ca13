"""A run's teacher: any image classifier, made fast for inference, or its answers from an earlier run."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from deit_fast._extras import require
from deit_fast.train import build
from deit_fast.train.folding import folded, logits_of
from deit_fast.train.logits import Key, Logits
from deit_fast.train.recipe import GROUPS, NAMES, Recipe

if TYPE_CHECKING:
    from deit_fast.train.run import Job


class Teacher(nn.Module):
    """Logits [B, classes] in float32 of a model for the student's images.

    `begin` starts to compute them, on a GPU on a stream of its own, and the call waits for that. `seconds` counts the
    time of both, on a GPU until the kernels are launched. The model is folded, compiled and moved to the images' device
    when it is first needed: never, where `cache` has all answers.

    model: of `load`. student_config: mean and standard deviation of the images. classes: the model's class for each of
    the student's. compiled: by torch.compile.
    """

    scale: Tensor
    shift: Tensor
    classes: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        student_config: dict[str, Any],
        classes: Sequence[int] | None = None,
        compiled: bool = False,
    ):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.compiled = compiled
        own: Any = model.pretrained_cfg
        self.size = tuple(own["input_size"][1:]) if own.get("fixed_input_size") else None
        mean, std = (torch.tensor(student_config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        own_mean, own_std = (torch.tensor(own[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)
        self.register_buffer("classes", None if classes is None else torch.tensor(classes))
        self.eval()
        self.cache: Logits | None = None
        self.seconds = 0.0
        self._prepared = False
        self._stream: Any = None

    @cached_property
    def digest(self) -> str:
        """Of all that the logits follow from but the images; to be asked before the first of them."""
        # What repr doesn't tell of an attention.
        heads = [getattr(module, "num_heads", None) for module in self.model.modules()]
        digest = hashlib.blake2b(repr((self.size, self.model, heads)).encode(), digest_size=16)
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def begin(self, images: Tensor, key: Key) -> None:
        """images: [B, C, H, W] as the student gets them. key: what the cache knows them by."""
        start = time.perf_counter()
        self._key = key
        read = self.cache.get(key, images.device) if self.cache is not None else None
        self._new = read is None
        if read is None:
            if not self._prepared:
                self._prepare(images)
            with self._beside(images):
                self._logits = self._answer(images)
        else:
            self._logits = read
        self.seconds += time.perf_counter() - start

    def forward(self, images: Tensor) -> Tensor:
        """The logits of the images that were begun with."""
        start = time.perf_counter()
        if self._stream is not None and self._new:
            current = torch.cuda.current_stream(images.device)
            current.wait_stream(self._stream)
            self._logits.record_stream(current)
        if self.cache is not None and self._new:
            self.cache.put(self._key, self._logits)
        self.seconds += time.perf_counter() - start
        return self._logits

    def _answer(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            images = torch.addcmul(self.shift, images, self.scale)
            if self.size is not None and self.size != images.shape[2:]:
                images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
            logits = logits_of(self.model(images)).float()
            logits = logits if self.classes is None else logits[:, self.classes]
        return logits.clone()  # what is made in inference mode can't be saved for backward

    def _prepare(self, images: Tensor) -> None:
        if not build.swap_known(self.model):
            self.model = folded(self.model, (images.shape[1], *(self.size or images.shape[2:])))
            self.model.to(memory_format=torch.channels_last)  # which a convolution hands on
        self.to(images.device)
        if self.compiled:
            self.model.compile()
        if images.is_cuda:
            self._stream = torch.cuda.Stream(images.device)
        self._prepared = True

    def _beside(self, images: Tensor) -> AbstractContextManager[Any]:
        """A stream that starts where the current one is."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(images.device))
        images.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def teacher_of(
    recipe: Recipe, job: "Job", num_classes: int, images: str, student_config: dict[str, Any], accelerator: Accelerator
) -> Teacher | None:
    """A run's teacher, with its cache, or None. num_classes: of the images; images: their `samples.fingerprint`.

    Raises:
        ValueError, FileNotFoundError: as `load` does; other classes than the images have; a cache of something else.
    """
    if job.teacher is None:
        return None
    model = load(job.teacher)
    classes = None if job.teacher_classes is None else read_classes(job.teacher_classes)
    if classes is None and model.num_classes != num_classes:
        raise ValueError(
            f"{job.teacher} knows {model.num_classes} classes, the images have {num_classes}: "
            f"--teacher-classes can say which of them these are"
        )
    if classes is not None and (len(classes) != num_classes or max(classes) >= model.num_classes):
        raise ValueError(
            f"{job.teacher_classes} must name {num_classes} classes, as the images have, from 0 to "
            f"{model.num_classes - 1}; it has {len(classes)}, up to {max(classes)}"
        )
    teacher = Teacher(model, student_config, classes, job.teacher_compile)
    if job.teacher_logits is not None:
        identity = {
            "teacher": teacher.digest,
            "images": images,
            "batch_size": recipe.batch_size * accelerator.num_processes,
            "parts": job.grad_accum_steps * accelerator.num_processes,
            "mixed_precision": job.mixed_precision,
            **{name: getattr(recipe, name) for name in ("seed", "distillation_type")},
            **{name: asdict(recipe)[name] for name in NAMES[NAMES.index(GROUPS["augmentation"]) :]},
            **{name: student_config[name] for name in ("input_size", "mean", "std")},
        }
        hard = recipe.distillation_type == "hard"
        with accelerator.main_process_first():
            teacher.cache = Logits(Path(job.teacher_logits), identity, num_classes, hard)
    return teacher


def read_classes(path: str) -> list[int]:
    """Whole numbers from a file: a JSON list, or one a line.

    Raises:
        ValueError: it holds something else.
        FileNotFoundError: there is no such file.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        classes = json.loads(text) if text.lstrip().startswith("[") else [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"{path} must hold whole numbers, a JSON list or one a line: {error}") from error
    if not classes or any(type(number) is not int or number < 0 for number in classes):
        raise ValueError(f"{path} must name the teacher's class, from 0 on, for each of the student's")
    return classes


def load(name: str) -> Any:
    """An image classifier in float32, with timm's `num_classes` and `pretrained_cfg`.

    name: timm's, a folder of timm or transformers, or a name with a slash of transformers' models at huggingface.co.

    Raises:
        ValueError: no such model, or one without a trained head.
        FileNotFoundError: a folder without weights as safetensors.
        ImportError: transformers is needed, and not there.
    """
    if _is_of_transformers(name):
        return _of_transformers(name)
    model = build.pretrained(name, None)
    model.pretrained_cfg = {**model.pretrained_cfg, **resolve_model_data_config(model)}
    return model


def _is_of_transformers(name: str) -> bool:
    if Path(name).is_dir():
        config = Path(name) / "config.json"
        return config.exists() and '"model_type"' in config.read_text(encoding="utf-8")  # timm has "architecture"
    return "/" in name and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:", "timm/"))


def _of_transformers(name: str) -> Any:
    transformers: Any = require("transformers", extra="transformers")
    try:
        classifier, processor = transformers.AutoModelForImageClassification, transformers.AutoImageProcessor
        model, loaded = classifier.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        images = processor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"transformers can't load {name}: {error}") from error
    if loaded["missing_keys"]:
        raise ValueError(f"{name} is no trained classifier: it has no {', '.join(sorted(loaded['missing_keys']))}")
    size = getattr(model.config, "image_size", None)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    model.num_classes = model.config.num_labels
    model.pretrained_cfg = {
        "mean": images.image_mean,
        "std": images.image_std,
        "input_size": (model.config.num_channels, height, width),
        "fixed_input_size": size is not None,
    }
    return model
