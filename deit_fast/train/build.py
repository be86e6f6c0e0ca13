"""What a recipe names, made with timm: model, data configuration, loss, optimizer, mixup."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import DropPath, PatchEmbed
from timm.loss import create_classification_loss
from timm.models import resolve_model_input_args
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from deit_fast.models.checkpoint import load_checkpoint
from deit_fast.models.key_maps import to_timm_names
from deit_fast.swap import swap
from deit_fast.train.distillation import DistillationLoss
from deit_fast.train.masked import MaskedImages
from deit_fast.train.recipe import Recipe

# What masked image modelling has beside the encoder, by transformers' names.
_FILLING = r"(embeddings\.mask_token|decoder\..*)"
_AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def weights_of(recipe: Recipe) -> dict[str, Tensor] | None:
    """What the recipe's model begins with, by timm's names; None where nothing is said.

    Raises:
        ValueError, FileNotFoundError: it can't be loaded.
    """
    if recipe.finetune is None:
        return None
    if recipe.pretrained_name is not None:
        return pretrained(recipe.pretrained_name, None).state_dict()
    entries = to_timm_names(load_checkpoint(recipe.finetune).state_dict)
    return {name: entry.tensor for name, entry in entries.items() if not re.fullmatch(_FILLING, name)}


def model_of(recipe: Recipe, num_classes: int, weights: dict[str, Tensor] | None = None) -> Any:
    """timm's, with new weights or with `weights`, but for heads of other classes; timm interpolates the positions.

    A distilled model that is fine-tuned without a teacher keeps its distillation token, and has the class head alone.

    Raises:
        ValueError: no such model, options that it does not take, weights that don't fit, or one head where
            distillation needs two.
    """
    options: dict[str, Any] = {"drop_rate": recipe.drop, "drop_path_rate": recipe.drop_path}
    options = {name: rate for name, rate in options.items() if rate} | recipe.model_kwargs
    size = None if recipe.input_size is None else {"img_size": recipe.input_size}
    num_classes = 0 if recipe.masks else num_classes
    name = recipe.pretrained_name or recipe.model
    try:
        named = resolve_model_input_args(name, size, num_classes=num_classes, **options)
        if recipe.finetune is not None and not (recipe.distils or recipe.masks):
            _with_class_head_alone(named)
        model: Any = timm.create_model(named.pop("model_name"), **named)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(f"timm can't make the model {name}: {error}") from error
    if weights is not None:
        try:
            _begin(model, weights)
        except RuntimeError as error:
            raise ValueError(f"the weights of {recipe.finetune} don't fit the model {name}: {error}") from error
    if recipe.distils:
        if not hasattr(model, "set_distilled_training"):
            raise ValueError(f"{name} has one head; distillation needs a distilled model, with two")
        model.set_distilled_training(True)
    if recipe.uniform_drop_path:
        if not hasattr(model, "blocks"):
            raise ValueError(f"{name} has no blocks to give a uniform drop path to")
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(recipe.drop_path), DropPath(recipe.drop_path)
    return model


def _with_class_head_alone(named: dict[str, Any]) -> None:
    """As transformers' DeiTForImageClassification: the distillation token stays, for timm a register token."""
    if "_distilled" in named["model_name"]:
        named["model_name"] = named["model_name"].replace("_distilled", "")
        named["reg_tokens"] = 1
        named["pretrained_cfg"] |= {"architecture": named["model_name"], "classifier": "head"}


def _begin(model: Any, weights: dict[str, Tensor]) -> None:
    if getattr(model, "reg_token", None) is not None and "dist_token" in weights:
        weights = {name.replace("dist_token", "reg_token"): tensor for name, tensor in weights.items()}
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("head_dist.")}
    heads, theirs = (
        {name: tensor for name, tensor in each.items() if name.startswith(_names_of_heads(model))}
        for each in (model.state_dict(), weights)
    )
    if {name: tensor.shape for name, tensor in heads.items()} != {name: each.shape for name, each in theirs.items()}:
        weights = {name: tensor for name, tensor in weights.items() if name not in theirs} | heads
    model.load_state_dict(checkpoint_filter_fn(weights, model))


def _names_of_heads(model: Any) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def trained_of(recipe: Recipe, model: Any) -> Any:
    """`model`, or the module that fills in masked images with it. A linear probe's backbone is frozen."""
    if recipe.mask_ratio is not None:
        return MaskedImages(model, recipe.mask_ratio, recipe.mask_patch_size)
    if recipe.linear_probe:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(_names_of_heads(model)))
    return model


def rest_backbone(model: Any) -> None:
    """All but the heads, of a model in training mode, to evaluation mode: no dropout, no drop path."""
    for name, module in model.named_children():
        if not f"{name}.".startswith(_names_of_heads(model)):
            module.eval()


def data_config_of(recipe: Recipe, model: nn.Module) -> dict[str, Any]:
    """Size, mean and standard deviation of the images that `model` takes, and how they are resized."""
    size = {} if recipe.input_size is None else {"img_size": recipe.input_size}
    how = {"interpolation": recipe.train_interpolation, "crop_pct": recipe.eval_crop_ratio}
    return resolve_model_data_config(model, args={**size, **how})


def images_dtype_of(model: nn.Module, mixed_precision: str) -> torch.dtype:
    """What images `model` may get with no number changed: what autocast casts them to first, or float32.

    mixed_precision: Accelerate's "no", "bf16" or "fp16".
    """
    casts_first = isinstance(model, VisionTransformer) and isinstance(model.patch_embed, PatchEmbed)
    return _AUTOCAST_DTYPES.get(mixed_precision, torch.float32) if casts_first else torch.float32


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


def loss_of(recipe: Recipe, teacher: nn.Module | None) -> Callable[[Tensor, Any, Tensor], Tensor]:
    """Of images, outputs and labels, as main.py of the original repository makes it.

    Binary cross-entropy takes every mixed class as a full one. A model that fills in images gives its losses itself.
    """
    if recipe.masks:
        return lambda images, losses, labels: losses.mean()
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
        options |= {"weight_decay": recipe.weight_decay, "layer_decay": recipe.layer_decay}
        return create_optimizer_v2(model, recipe.opt, lr=lr, **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"timm can't make the optimizer {recipe.opt}: {error}") from error


def schedule_of(recipe: Recipe, optimizer: torch.optim.Optimizer) -> Any:
    """timm's, to be stepped each epoch; None for a constant learning rate.

    Raises:
        ValueError: there is no such schedule.
    """
    try:
        return create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
        )[0]
    except (AssertionError, ValueError) as error:
        raise ValueError(f"timm can't make the schedule {recipe.sched}: {error}") from error


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
