"""Stochastic depth: timm's module, and the draw by which a block computes its branches for the kept samples alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deit_fast import ops
from deit_fast.nn import guards, parts
from deit_fast.nn.layer_scale import gamma_of
from deit_fast.nn.parts import Part


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch x [B, ...] is dropped with `drop_prob`, the rest scaled up.

    The mask is drawn as timm's DropPath draws it, so one seed gives one mask (Huang et al. 2016).
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and self.scale_by_keep:
            mask.div_(keep_prob)
        return x * mask

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


parts.add(parts.DROP_PATHS, DropPath)


class DropPathDraw(NamedTuple):
    """What one branch's drop path comes to.

    scale: one factor [B] a sample, 0 or 1 / keep_prob; None where nothing is scaled.
    kept: for which samples the branch is computed (`ops.keep_samples`); None for all.
    capacity: for how many of them packed tensors have room.
    """

    scale: Tensor | None = None
    kept: Tensor | None = None
    capacity: int | None = None


NO_DROP_PATH = DropPathDraw()


def drop_path_of(
    block: Part,
    branch: int,
    drop_path: Part | None,
    x: Tensor,
    projection: Part,
    layer_scale: Tensor | None,
    gather: bool,
) -> DropPathDraw:
    """The draw of `block`'s first or second branch (0, 1): made in `drawn_ahead`, or now.

    Arguments as of `draw_drop_path`.
    """
    ahead = block.__dict__.get("_deit_fast_drawn")
    if ahead is None:
        return draw_drop_path(drop_path, x, projection, layer_scale, gather)
    return ahead[branch] if gather else DropPathDraw(ahead[branch].scale)


def draw_drop_path(
    drop_path: Part | None, x: Tensor, projection: Part, layer_scale: Tensor | None, gather: bool = True
) -> DropPathDraw:
    """Which samples of x [B, ...] have their branch computed, and by what it is scaled.

    projection: the branch's last, layer_scale: its factors [D]; both tell the branch's dtype.
    gather: False computes the branch for all samples.
    """
    scale = _draw_scale(drop_path, x, projection, layer_scale)
    # torch.func's transforms can't have shapes that hang on values.
    if scale is None:
        return NO_DROP_PATH
    if not gather or torch._C._are_functorch_transforms_active():
        return DropPathDraw(scale)
    kept = ops.keep_samples(scale)
    count = ops.known_count(kept)
    if count == x.shape[0]:
        return DropPathDraw(scale)
    return DropPathDraw(scale, kept, x.shape[0] if count is None else count)


def _draw_scale(drop_path: Part | None, x: Tensor, projection: Part, layer_scale: Tensor | None) -> Tensor | None:
    """Drawn as the stock module draws it, so that the same seed keeps the same samples.

    The stock mask has the dtype of the branch it multiplies, and 1 / keep_prob is rounded to that dtype.
    """
    if drop_path is None or type(drop_path) in parts.IDENTITIES:
        return None
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    dtype = projection.weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    keep_prob = 1 - drop_path.drop_prob
    # Of x, as stock's is of the branch: under vmap each of its samples draws.
    scale = x.new_empty((x.shape[0],), dtype=dtype).bernoulli_(keep_prob)
    if keep_prob > 0.0 and drop_path.scale_by_keep:
        scale.div_(keep_prob)
    return scale


def can_draw_ahead(blocks: Sequence[Part]) -> bool:
    """Whether `drawn_ahead` draws for `blocks` what their calls would: all are fused, and each is used once."""
    return (
        not torch.compiler.is_compiling()
        and len(set(blocks)) == len(blocks)
        and all(parts.unfusable(b, parts.BLOCKS) is None and guards.block_unfusable(b) is None for b in blocks)
    )


@contextmanager
def drawn_ahead(blocks: Sequence[Part], x: Tensor) -> Iterator[None]:
    """Within, `blocks` keep no room for the samples of x [B, ...] that drop path drops.

    One host read, of all counts together.

    Every drop path is drawn here, in the order in which the blocks would; so only where nothing else that is random
    comes between: blocks that are all fused, not checkpointed.
    """
    draws = []
    for block in blocks:
        modules = block._modules
        for i, projection in ((1, modules["attn"]._modules["proj"]), (2, modules["mlp"]._modules["fc2"])):
            draws.append(draw_drop_path(modules.get(f"drop_path{i}"), x, projection, gamma_of(modules.get(f"ls{i}"))))
    counted = [(i, draw.kept) for i, draw in enumerate(draws) if draw.kept is not None]
    if counted:
        counts = torch.stack([kept[0] for _, kept in counted]).tolist()
        for (i, _), count in zip(counted, counts, strict=True):
            draws[i] = draws[i]._replace(capacity=count)
    try:
        for i, block in enumerate(blocks):
            block.__dict__["_deit_fast_drawn"] = (draws[2 * i], draws[2 * i + 1])
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("_deit_fast_drawn", None)
