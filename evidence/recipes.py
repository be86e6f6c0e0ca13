"""The published recipes' drop paths, and the floating-point operations of their training steps.

The swapped model is counted whole at its real size, with the masks that each seed draws; its matrix products are
counted and left uncomputed (`WithoutProducts`). Stock computes every sample whatever the masks, in proportion to the
batch, so it is counted once, with one image.
"""

from dataclasses import dataclass
from statistics import fmean

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.benchmark.contenders import timm_model
from deit_fast.benchmark.flops import WithoutProducts, step_flops
from evidence.models import images

SEEDS = 10


@dataclass(frozen=True)
class Recipe:
    """everywhere: the rate in every layer, as DeiT III was trained; else rising linearly to it from 0, as DeiT."""

    name: str
    model: str
    rate: float
    everywhere: bool = False

    @property
    def drop_path(self) -> str:
        return f"{self.rate:g} {'in every layer' if self.everywhere else 'rising'}"

    def build(self) -> nn.Module:
        """timm's model, in training mode."""
        return timm_model(self.model, self.rate, self.everywhere).train()


RECIPES = {
    "tiny": Recipe("DeiT-Ti distilled", "deit_tiny_distilled_patch16_224", 0.1),
    "small": Recipe("DeiT-S distilled", "deit_small_distilled_patch16_224", 0.1),
    "base": Recipe("DeiT-B distilled", "deit_base_distilled_patch16_224", 0.1),
    "3-small": Recipe("DeiT III-S", "deit3_small_patch16_224", 0.05, everywhere=True),
    "3-base": Recipe("DeiT III-B", "deit3_base_patch16_224", 0.2, everywhere=True),
    "3-large": Recipe("DeiT III-L", "deit3_large_patch16_224", 0.45, everywhere=True),
    "3-huge": Recipe("DeiT III-H", "deit3_huge_patch14_224", 0.6, everywhere=True),
}


class KeptSamples(TorchDispatchMode):
    """How many samples the branches that can skip were drawn for, and how many they kept."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = self.kept = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.deit_fast.keep_samples:
            self.drawn += len(args[0])
            self.kept += int(result[0])
        return result


@dataclass(frozen=True)
class Work:
    """FLOPs of a training step; `with_drop_path` by seed, `kept` the share of branch samples that were computed."""

    stock: int
    without_drop_path: int
    with_drop_path: list[int]
    kept: float

    @property
    def ratio(self) -> float:
        return fmean(self.with_drop_path) / self.stock


def work(recipe: Recipe, batch: int, seeds: int = SEEDS) -> Work:
    import deit_fast
    from deit_fast.ops import backend

    with torch.device("meta"):
        model = recipe.build()
    model.to_empty(device="cpu")
    pixels = images(batch, torch.float32)
    with backend.forced("torch"), WithoutProducts():
        stock = batch * _step(model, pixels[:1])
        deit_fast.swap(model)
        swapped, samples = [], KeptSamples()
        for seed in range(seeds):
            torch.manual_seed(seed)
            with samples:
                swapped.append(_step(model, pixels))
        _without_drop_path(model)
        return Work(stock, _step(model, pixels), swapped, samples.kept / samples.drawn)


def _step(model: nn.Module, pixels: torch.Tensor) -> int:
    flops = step_flops(model, pixels)
    model.zero_grad()
    return flops


def _without_drop_path(model: nn.Module) -> None:
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = nn.Identity(), nn.Identity()
