"""What is timed against what: stock models of other libraries, eager and compiled, and the same on deit_fast."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

# The recipes' rates (DeiT: rising to the last block; DeiT III: the same in every block).
DROP_PATHS = {
    "deit3_small": 0.05,
    "deit3_base": 0.2,
    "deit3_large": 0.45,
    "deit3_huge": 0.6,
    "deit_": 0.1,
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelCase:
    """One thing to time: a timm model, a batch, a precision, inference or a training step.

    dtype: of the parameters. amp: autocast's dtype, or None. drop_path: stochastic depth's rate in training.
    """

    model: str
    batch: int
    img_size: int
    dtype: str = "float32"
    amp: str | None = None
    training: bool = False
    drop_path: float = 0.0

    @property
    def precision(self) -> str:
        return self.dtype if self.amp is None else f"amp {self.amp}"

    @property
    def title(self) -> str:
        step = f"training, drop path {self.drop_path:g}" if self.training else "inference"
        return f"{self.model}, {self.img_size} px, {step}, {self.precision}, batch {self.batch}"


def recipe_drop_path(model: str) -> float:
    """The rate that the recipe of a timm model names trains it with; 0 for models without one."""
    return next((rate for prefix, rate in DROP_PATHS.items() if model.startswith(prefix)), 0.0)


def is_ours(contender: str) -> bool:
    """Whether a contender of that name, for models or operators, is deit_fast in one form or another."""
    return contender.startswith("deit_fast")


@dataclass(frozen=True)
class Contender:
    """`build(case)` gives the model on the CPU in float32; `stock` names the contender that deit_fast stands in for.

    compiled: `torch.compile`'s mode. gpu_only: it has no meaning on a CPU. tuned: whether it heeds `deit-fast tune`.
    reference: builds the same function with the same weights, for a model that no CPU and no float64 can run.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[ModelCase], nn.Module]
    stock: str | None = None
    compiled: str | None = None
    gpu_only: bool = False
    tuned: bool = False
    reference: Callable[[ModelCase], nn.Module] | None = None

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be timed here, or None."""
        absent = [package for package in self.packages if find_spec(package) is None]
        if absent:
            return f"{', '.join(absent)} is not installed"
        if self.gpu_only and device.type != "cuda":
            return "it needs a GPU"
        return None

    def prepare(self, case: ModelCase, device: torch.device) -> nn.Module:
        model = self.build(case).to(device, DTYPES[case.dtype]).train(case.training)
        # In place of `torch.compile(model)`, which hides the model behind another module. What is timed is compiled
        # for its own batch, not for any after the one that was checked.
        if self.compiled is not None:
            # All models share one forward, of which dynamo keeps a few graphs: those before would leave it no room.
            torch._dynamo.reset()
            model.compile(mode=self.compiled, dynamic=False)
        return model


def timm_model(name: str, drop_path: float, everywhere: bool, **options: Any) -> Any:
    """timm's model with drop path in every block, as DeiT III was trained, or rising from 0 to it, as DeiT."""
    import timm
    from timm.layers import DropPath

    model: Any = timm.create_model(name, drop_path_rate=0.0 if everywhere else drop_path, **options)
    if everywhere and drop_path > 0.0:
        for block in model.blocks:
            block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    return model


def _timm(case: ModelCase, fused_attention: bool = True) -> Any:
    from timm.layers import set_fused_attn, use_fused_attn

    torch.manual_seed(0)
    previous = bool(use_fused_attn())
    set_fused_attn(fused_attention)
    try:
        return timm_model(case.model, case.drop_path, case.model.startswith("deit3"), img_size=case.img_size)
    finally:
        set_fused_attn(previous)


def _explicit(case: ModelCase) -> nn.Module:
    return _timm(case, fused_attention=False)


def _swapped(case: ModelCase) -> nn.Module:
    from deit_fast.swap import swap

    model = _timm(case)
    swap(model)
    return model


def _transformers(attention: str) -> Callable[[ModelCase], nn.Module]:
    def build(case: ModelCase) -> nn.Module:
        from transformers import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher

        like = _timm(replace(case, drop_path=0.0))
        # Which a base class takes, past the types.
        options: dict[str, Any] = {"num_labels": like.num_classes, "attn_implementation": attention}
        config = DeiTConfig(
            hidden_size=like.embed_dim,
            num_hidden_layers=len(like.blocks),
            num_attention_heads=like.blocks[0].attn.num_heads,
            intermediate_size=like.blocks[0].mlp.fc1.out_features,
            image_size=case.img_size,
            patch_size=like.patch_embed.patch_size[0],
            **options,
        )
        torch.manual_seed(0)
        # The one with a teacher has no loss, and no training mode, of its own.
        kind = DeiTForImageClassification if case.training else DeiTForImageClassificationWithTeacher
        return kind(config)

    return build


def _one_token(case: ModelCase) -> Any:
    """timm's model without a distillation token, which flash-attn's ViT does not have."""
    return _timm(replace(case, model=case.model.replace("_distilled", "")))


def _flash_attn(case: ModelCase) -> nn.Module:
    from flash_attn.models.vit import VisionTransformer

    like = _one_token(case)
    if any("gamma" in name for name, _ in like.named_parameters()):
        raise ValueError("flash-attn's ViT has no LayerScale")
    first = like.blocks[0]
    model = VisionTransformer(
        img_size=case.img_size,
        patch_size=like.patch_embed.patch_size[0],
        num_classes=like.num_classes,
        embed_dim=like.embed_dim,
        depth=len(like.blocks),
        num_heads=first.attn.num_heads,
        mlp_ratio=first.mlp.fc1.out_features / like.embed_dim,
        no_embed_class=like.no_embed_class,
        drop_path_rate=case.drop_path,
        use_flash_attn=True,
        # Extensions of their own. Its fused MLP is left out: it has no exact GELU.
        fused_bias_fc=find_spec("fused_dense_lib") is not None,
        fused_dropout_add_ln=find_spec("dropout_layer_norm") is not None,
    )
    # It takes timm's names.
    model.load_state_dict(like.state_dict())
    return model


_TIMM, _TRANSFORMERS = ("timm",), ("timm", "transformers")
CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("timm", _TIMM, _timm),
        Contender("timm, explicit attention", _TIMM, _explicit),
        Contender("transformers, eager", _TRANSFORMERS, _transformers("eager")),
        Contender("transformers, sdpa", _TRANSFORMERS, _transformers("sdpa")),
        Contender("flash-attn ViT", ("timm", "flash_attn"), _flash_attn, gpu_only=True, reference=_one_token),
        Contender("timm, compiled", _TIMM, _timm, compiled="default"),
        Contender("timm, compiled max-autotune", _TIMM, _timm, compiled="max-autotune", gpu_only=True),
        Contender("deit_fast", _TIMM, _swapped, stock="timm"),
        Contender("deit_fast, tuned", _TIMM, _swapped, stock="timm", gpu_only=True, tuned=True),
        Contender("deit_fast, compiled", _TIMM, _swapped, stock="timm, compiled", compiled="default"),
        Contender(
            "deit_fast, CUDA graphs",
            _TIMM,
            _swapped,
            stock="timm, compiled max-autotune",
            compiled="reduce-overhead",
            gpu_only=True,
        ),
    )
}
