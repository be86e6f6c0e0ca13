"""A training's recipe: values by the original repository's names, from a YAML file and the command line."""

import argparse
import ast
import json
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from deit_fast._extras import require
from deit_fast.models.checkpoint import SUFFIXES
from deit_fast.train.distillation import DISTILLATION_TYPES

FOLDER = Path(__file__).with_name("recipes")
# Each begins with the field it is given with, and ends before the next.
GROUPS = {"model": "model", "schedule": "epochs", "loss": "smoothing", "augmentation": "repeated_aug"}


@dataclass(frozen=True)
class Recipe:
    """What a training computes; `recipes/deit.yaml` explains each value."""

    model: str
    model_kwargs: dict[str, Any]
    input_size: int | None
    finetune: str | None
    linear_probe: bool
    drop: float
    drop_path: float
    uniform_drop_path: bool
    model_ema: bool
    model_ema_decay: float
    epochs: int
    batch_size: int
    lr: float
    unscale_lr: bool
    sched: str
    warmup_epochs: int
    warmup_lr: float
    min_lr: float
    opt: str
    opt_eps: float | None
    weight_decay: float
    layer_decay: float | None
    clip_grad: float | None
    seed: int
    smoothing: float
    bce_loss: bool
    distillation_type: str
    distillation_alpha: float
    distillation_tau: float
    mask_ratio: float | None
    mask_patch_size: int
    repeated_aug: bool
    src: bool
    scale: tuple[float, float]
    train_interpolation: str
    eval_crop_ratio: float
    hflip: float
    color_jitter: float | None
    aa: str | None
    reprob: float
    remode: str
    recount: int
    mixup: float
    cutmix: float
    mixup_prob: float
    mixup_switch_prob: float
    mixup_mode: str

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix makes soft targets."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def distils(self) -> bool:
        return self.distillation_type != "none"

    @property
    def masks(self) -> bool:
        """Whether squares of the images are masked and filled in, and no classes are learnt."""
        return self.mask_ratio is not None

    @property
    def pretrained_name(self) -> str | None:
        """timm's name of the model that `finetune` is; None where it is weights alone, whose model `model` says."""
        if self.finetune is None:
            return None
        path = Path(self.finetune.removeprefix("local-dir:"))
        if not path.exists():
            return None if path.suffix in SUFFIXES else self.finetune
        config = path / "config.json"
        return f"local-dir:{path}" if config.exists() and "architecture" in json.loads(config.read_text()) else None


_MIXUP_MODES = ("batch", "pair", "elem")
NAMES = [field.name for field in fields(Recipe)]
_TYPES = get_type_hints(Recipe)


def recipes() -> list[str]:
    """The names of those that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(recipe: str = "deit", **given: Any) -> Recipe:
    """One of `recipes()` or a YAML file of the same form, with the values `given` in place of its own.

    Raises:
        ValueError: no such recipe, an unknown name, a value of another type, values that contradict each other.
        FileNotFoundError: no such file.
    """
    path = Path(recipe) if recipe.endswith((".yaml", ".yml")) else FOLDER / f"{recipe}.yaml"
    if path.parent == FOLDER and not path.exists():
        raise ValueError(f"there is no recipe {recipe!r}: {', '.join(recipes())}, or the path of a .yaml file")
    values = _read(FOLDER / "deit.yaml") | _read(path) | given
    made = Recipe(**{name: _typed(name, value) for name, value in values.items()})
    for wrong in _contradictions(made, given):
        raise ValueError(wrong)
    return made


def _read(path: Path) -> dict[str, Any]:
    yaml = require("yaml", extra="train")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values, not a {type(values).__name__}")
    unknown = [str(name) for name in values if name not in NAMES]
    if unknown:
        raise ValueError(f"{path}: a recipe has no {', '.join(unknown)}; it has {', '.join(NAMES)}")
    return values


def _typed(name: str, value: Any) -> Any:
    """`value` as the field has it; YAML takes 1e-4 for a string."""
    kind = _TYPES[name]
    if isinstance(kind, types.UnionType):
        if value is None or value == "none":
            return None
        kind = get_args(kind)[0]
    try:
        if get_origin(kind) is tuple:
            low, high = value
            return float(low), float(high)
        if get_origin(kind) is dict:
            return dict(value)
        if (kind is bool and not isinstance(value, bool)) or (kind is int and float(value) != int(value)):
            raise ValueError(value)
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}") from error


def _contradictions(recipe: Recipe, given: Mapping[str, Any]) -> Iterator[str]:
    if recipe.distillation_type not in DISTILLATION_TYPES:
        yield f"distillation_type must be one of {', '.join(DISTILLATION_TYPES)}, got {recipe.distillation_type!r}"
    if recipe.mixup_mode not in _MIXUP_MODES:
        yield f"mixup_mode must be one of {', '.join(_MIXUP_MODES)}, got {recipe.mixup_mode!r}"
    if recipe.sched == "plateau":
        yield "sched plateau needs a measure that falls, and the learning rate follows the epoch: take another"
    for name in ("epochs", "batch_size", "lr", "eval_crop_ratio"):
        if not getattr(recipe, name) > 0:
            yield f"{name} must be positive, got {getattr(recipe, name)}"
    for name in ("drop", "drop_path", "smoothing", "reprob", "hflip", "mixup_prob", "distillation_alpha"):
        if not 0 <= getattr(recipe, name) <= 1:
            yield f"{name} must be from 0 to 1, got {getattr(recipe, name)}"
    if not 0 <= recipe.warmup_epochs < recipe.epochs:
        yield f"warmup_epochs, {recipe.warmup_epochs}, must be below epochs, {recipe.epochs}"
    if recipe.mixes and recipe.batch_size % 2:
        yield f"mixup and cutmix pair images: batch_size must be even, got {recipe.batch_size}"
    if not 0 < recipe.scale[0] <= recipe.scale[1]:
        yield f"scale must be two shares of the area, the smaller first, got {recipe.scale}"
    if recipe.mask_ratio is not None and not 0 < recipe.mask_ratio < 1:
        yield f"mask_ratio must be between 0 and 1, got {recipe.mask_ratio}"
    if recipe.layer_decay is not None and not 0 < recipe.layer_decay <= 1:
        yield f"layer_decay must be above 0 and at most 1, got {recipe.layer_decay}"
    for name, value in (("mixup", recipe.mixup), ("cutmix", recipe.cutmix), ("smoothing", recipe.smoothing)):
        if recipe.masks and value:
            yield f"mask_ratio is given, so there are no classes to learn: {name} must be 0, got {value}"
    for name in ("distils", "bce_loss", "linear_probe", "model_ema", "layer_decay"):
        if recipe.masks and getattr(recipe, name):
            yield f"mask_ratio and {'distillation_type' if name == 'distils' else name} exclude each other"
    if recipe.linear_probe and recipe.finetune is None:
        yield "linear_probe needs finetune"
    needs = {
        "model": (recipe.pretrained_name is None, "a finetune of weights that do not say theirs"),
        "mask_patch_size": (recipe.masks, "mask_ratio"),
        "layer_decay": (not recipe.linear_probe, "layers that train, so no linear_probe"),
        "drop": (not recipe.linear_probe, "layers that train, so no linear_probe"),
        "drop_path": (not recipe.linear_probe, "layers that train, so no linear_probe"),
        "distillation_alpha": (recipe.distils, "distillation_type soft or hard"),
        "distillation_tau": (recipe.distillation_type == "soft", "distillation_type soft"),
        "model_ema_decay": (recipe.model_ema, "model_ema"),
        "mixup_prob": (recipe.mixes, "mixup or cutmix"),
        "mixup_mode": (recipe.mixes, "mixup or cutmix"),
        "mixup_switch_prob": (recipe.mixup > 0 and recipe.cutmix > 0, "both mixup and cutmix"),
        "uniform_drop_path": (recipe.drop_path > 0 or not recipe.uniform_drop_path, "drop_path above 0"),
        "scale": (not recipe.src, "a random resized crop, so no src"),
        "remode": (recipe.reprob > 0, "reprob above 0"),
        "recount": (recipe.reprob > 0, "reprob above 0"),
    }
    for name in given:
        met, needed = needs.get(name, (True, ""))
        if not met:
            yield f"{name} is given, and would change nothing without {needed}"


# -- the command line


def add_options(parser: argparse.ArgumentParser) -> None:
    """An option for each value of a recipe; what is not given is absent from the namespace."""
    for name in NAMES:
        option, kind = f"--{name.replace('_', '-')}", _TYPES[name]
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is dict:
            how |= {"nargs": "*", "type": _pair}
        elif get_origin(kind) is tuple:
            how["nargs"] = 2
        parser.add_argument(option, **how)
    parser.add_argument(
        "--ThreeAugment", dest="aa", action="store_const", const="3a", default=argparse.SUPPRESS, help=argparse.SUPPRESS
    )


def given(args: argparse.Namespace) -> dict[str, Any]:
    """The values of a recipe that the user gave."""
    return {name: value for name, value in vars(args).items() if name in NAMES}


def explained(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each group's name, and its options with the recipe's values."""
    values = asdict(recipe)
    starts = [NAMES.index(first) for first in GROUPS.values()]
    for group, start, end in zip(GROUPS, starts, [*starts[1:], None], strict=True):
        yield group, " ".join(_option(name, values[name]) for name in NAMES[start:end])


def _option(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if isinstance(value, tuple):
        return f"--{option} {value[0]} {value[1]}"
    if isinstance(value, dict):
        return f"--{option} NAME=VALUE"
    return f"--{option} {'none' if value is None else value}"


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
