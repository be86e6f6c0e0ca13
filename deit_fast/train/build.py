"""What a recipe names, made with timm: model, data configuration, loss, optimizer, mixup, teacher."""

import inspect
import json
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import DropPath
from timm.loss import create_classification_loss
from timm.models import resolve_model_input_args
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.task import DistillationTeacher
from torch import Tensor, nn

from deit_fast.swap import swap
from deit_fast.train.distillation import DistillationLoss
from deit_fast.train.recipe import Recipe


def model_of(recipe: Recipe, num_classes: int) -> Any:
    """timm's, with new weights.

    Raises:
        ValueError: no such model, options that it does not take, or one head where distillation needs two.
    """
    options: dict[str, Any] = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    options = {name: rate for name, rate in options.items() if rate} | recipe.model_kwargs
    size = None if recipe.input_size is None else {"img_size": recipe.input_size}
    try:
        named = resolve_model_input_args(recipe.model, size, num_classes=num_classes, **options)
        model: Any = timm.create_model(named.pop("model_name"), **named)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm can't make the model {recipe.model}: {error}") from error
    if recipe.distils:
        if not hasattr(model, "set_distilled_training"):
            raise ValueError(f"{recipe.model} has one head; distillation needs a distilled model, with two")
        model.set_distilled_training(True)
    if recipe.uniform_drop_path:
        if not hasattr(model, "blocks"):
            raise ValueError(f"{recipe.model} has no blocks to give a uniform drop path to")
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(recipe.drop_path), DropPath(recipe.drop_path)
    return model


def data_config_of(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Size, mean and standard deviation of the images that `model` takes, and how they are resized."""
    size = {} if recipe.input_size is None else {"img_size": recipe.input_size}
    how = {"interpolation": recipe.train_interpolation, "crop_pct": recipe.eval_crop_ratio}
    return resolve_model_data_config(model, args={**size, **how})


def mixup_of(recipe: Recipe, num_classes: int) -> Mixup | None:
    if not recipe.mixes:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        mode=recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=num_classes,
    )


def loss_of(recipe: Recipe, teacher: nn.Module | None) -> DistillationLoss:
    """As main.py of the original repository makes it; binary cross-entropy takes every mixed class as a full one."""
    base = create_classification_loss(
        "bce" if recipe.bce_loss else "ce",
        smoothing=recipe.smoothing,
        soft_targets=recipe.mixes,
        bce_target_thresh=0.0 if recipe.bce_loss and recipe.mixes else None,
    )
    alpha, tau = recipe.distillation_alpha, recipe.distillation_tau
    return DistillationLoss(base, teacher, recipe.distillation_type, alpha, tau)


def optimizer_of(recipe: Recipe, model: nn.Module, batch_size: int) -> torch.optim.Optimizer:
    """timm's, torch's fused one where it has one. batch_size: over all processes."""
    try:
        kind: Any = get_optimizer_class(recipe.opt, bind_defaults=False)
        options: dict[str, Any] = {"fused": True} if "fused" in inspect.signature(kind).parameters else {}
        if recipe.opt_eps is not None:
            options["eps"] = recipe.opt_eps
        lr = recipe.lr if recipe.unscale_lr else recipe.lr * batch_size / 512
        return create_optimizer_v2(model, recipe.opt, lr=lr, weight_decay=recipe.weight_decay, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"timm can't make the optimizer {recipe.opt}: {error}") from error


class Teacher(DistillationTeacher):
    """timm's wrapper, given the student's images; `seconds` counts the time of its calls."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, student_config: dict[str, Any]):
        super().__init__(model)
        self.eval().requires_grad_(False)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(student_config[name]).view(1, -1, 1, 1), persistent=False)
        self.seconds = 0.0

    def forward(self, input: Tensor, return_features: bool = False) -> Tensor:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = super().forward(self.normalize_input(input, self.mean, self.std), return_features)
        self.seconds += time.perf_counter() - start
        return logits.clone()  # what is made in inference mode can't be saved for backward


def pretrained(name: str, num_classes: int | None) -> Any:
    """A timm model with weights, swapped where it is a ViT: by its name, or a folder that `deit-fast train` wrote.

    num_classes: of the images, where that is known.

    Raises:
        ValueError: no such model, or of other classes.
        FileNotFoundError: a folder without weights as safetensors.
    """
    folder = Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        if not (folder / "model.safetensors").exists():
            raise FileNotFoundError(f"{folder} has no model.safetensors")
        name = f"local-dir:{folder}"
    try:
        model = timm.create_model(name, pretrained=True)
    except (RuntimeError, json.JSONDecodeError) as error:
        raise ValueError(f"timm can't load {name}: {error}") from error
    if num_classes is not None and model.num_classes != num_classes:
        raise ValueError(f"{name} knows {model.num_classes} classes, the images have {num_classes}")
    swap_known(model)
    return model.eval()


def swap_known(model: nn.Module, memory: str = "balanced") -> bool:
    """`swap`, where there is something to swap."""
    try:
        swap(model, memory=memory)
    except ValueError:
        return False
    return True
