"""The forward of each module, and the check that says when it may be taken.

Both read timm's attribute names, so they serve `deit_fast.nn` and the swapped modules of timm alike.
`*_unfusable` runs at every call, where hooks, train/eval or replaced parts may have changed the answer: it reads
`_modules` directly, which costs a tenth of attribute access.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from deit_fast import ops
from deit_fast.kernels import mlp as mlp_kernels
from deit_fast.nn import parts

MEMORIES = ("balanced", "low")

# LayerNorm --------------------------------------------------------------------------------------------------------


def layer_norm_unfusable(norm: Module) -> str | None:
    """Why LayerNorm's operator can't stand for `norm.forward`, or None."""
    if len(norm.normalized_shape) != 1:
        return "normalizes over more than one dimension"
    if not parts.plain_parameters(norm):
        return "has a tensor subclass for a parameter"
    return None


def layer_norm_forward(norm: Module, x: Tensor) -> Tensor:
    return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


# Attention --------------------------------------------------------------------------------------------------------


def attention_unfusable(attn: Module) -> str | None:
    """Why `attention_forward(attn, x)` would not be what `attn.forward(x)` computes now, or None."""
    modules = attn._modules
    for name in ("qkv", "proj"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    if not _identity(modules.get("q_norm")) or not _identity(modules.get("k_norm")):
        return "normalizes queries and keys"
    if not _identity(modules.get("norm")):
        return "normalizes the attention output"
    if modules.get("gate") is not None:
        return "gates the attention output"
    if not parts.idle_dropout(modules["attn_drop"]) or not parts.idle_dropout(modules["proj_drop"]):
        return "dropout is active"
    return None


def _identity(module: Module | None) -> bool:
    return module is None or (type(module) in parts.IDENTITIES and parts.touched(module) is None)


def attention_forward(attn: Module, x: Tensor) -> Tensor:
    """QKV projection, attention, output projection: x [B, N, D] → [B, N, D]."""
    modules = attn._modules
    qkv, proj = modules["qkv"], modules["proj"]
    out = _attend(ops.linear(x, qkv.weight, qkv.bias), attn, None)
    return ops.linear(out, proj.weight, proj.bias)


def _attend(qkv: Tensor, attn: Module, kept: Tensor | None) -> Tensor:
    batch, tokens, width = qkv.shape
    heads = attn.num_heads
    out, _ = ops.attention(qkv.view(batch, tokens, 3, heads, width // (3 * heads)), attn.scale, kept)
    return out


def attend_normalised(
    norm: Module, attn: Module, x: Tensor, kept: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor]:
    """LayerNorm, QKV and attention, before the output projection, with `kept` packed; and x for the residual."""
    qkv = attn._modules["qkv"]
    arguments = (x, norm.weight, norm.bias, norm.eps, qkv.weight, qkv.bias)
    qkv, x = ops.layer_norm_linear_branching(*arguments, kept, capacity)
    return _attend(qkv, attn, kept), x


# MLP --------------------------------------------------------------------------------------------------------------


def mlp_unfusable(mlp: Module) -> str | None:
    """Why `mlp_forward(mlp, x)` would not be what `mlp.forward(x)` computes now, or None."""
    modules = mlp._modules
    for name in ("fc1", "fc2"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    activation = modules["act"]
    if parts.gelu_name(activation) is None:
        return f"its activation is {parts.class_name(activation)}, not GELU"
    if parts.touched(activation) is not None:
        return f"act {parts.touched(activation)}"
    if not _identity(modules.get("norm")):
        return "normalizes the hidden layer"
    if not parts.idle_dropout(modules["drop1"]) or not parts.idle_dropout(modules["drop2"]):
        return "dropout is active"
    return None


def mlp_forward(mlp: Module, x: Tensor) -> Tensor:
    """FC1, GELU, FC2: x [..., D] → [..., D_out]."""
    modules = mlp._modules
    return mlp_linears(x, modules["fc1"], modules["fc2"], parts.gelu_name(modules["act"]))


def mlp_linears(x: Tensor, fc1: Module, fc2: Module, activation: str) -> Tensor:
    """GELU in the epilogue of FC1; where backward will want the pre-activation, as FC2 loads it."""
    if torch.is_grad_enabled():
        hidden = ops.linear(x, fc1.weight, fc1.bias)
        return ops.linear(hidden, fc2.weight, fc2.bias, input_activation=activation)
    hidden = ops.linear(x, fc1.weight, fc1.bias, activation=activation)
    return ops.linear(hidden, fc2.weight, fc2.bias)


# Drop path --------------------------------------------------------------------------------------------------------


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


def draw_drop_path(drop_path: Module | None, x: Tensor, weight: Tensor, layer_scale: Tensor | None) -> DropPathDraw:
    """Which samples of x [B, ...] have their branch computed, and by what it is scaled."""
    scale = draw_drop_path_scale(drop_path, x, weight, layer_scale)
    # torch.func's transforms can't have shapes that hang on values.
    if scale is None or torch._C._are_functorch_transforms_active():
        return DropPathDraw(scale)
    kept = ops.keep_samples(scale)
    count = ops.known_count(kept)
    if count == x.shape[0]:
        return DropPathDraw(scale)
    return DropPathDraw(scale, kept, x.shape[0] if count is None else count)


@contextmanager
def drawn_ahead(blocks: Sequence[Module], x: Tensor) -> Iterator[None]:
    """Within, `blocks` keep no room for the samples that drop path drops: one host read, of all counts together.

    Every drop path is drawn here, in the order in which the blocks would; so only where nothing else that is random
    comes between: blocks that are all fused, not checkpointed.
    """
    draws = []
    for block in blocks:
        modules = block._modules
        for i, weight in ((1, modules["attn"]._modules["proj"].weight), (2, modules["mlp"]._modules["fc2"].weight)):
            draws.append(draw_drop_path(modules.get(f"drop_path{i}"), x, weight, _gamma(modules.get(f"ls{i}"))))
    counted = [i for i, draw in enumerate(draws) if draw.kept is not None]
    if counted:
        counts = torch.stack([draws[i].kept[0] for i in counted]).tolist()
        for i, count in zip(counted, counts, strict=True):
            draws[i] = draws[i]._replace(capacity=count)
    try:
        for i, block in enumerate(blocks):
            block.__dict__["_deit_fast_drawn"] = (draws[2 * i], draws[2 * i + 1])
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("_deit_fast_drawn", None)


def _drawn(block: Module) -> tuple[DropPathDraw | None, DropPathDraw | None]:
    return block.__dict__.get("_deit_fast_drawn", (None, None))


def draw_drop_path_scale(
    drop_path: Module | None, x: Tensor, weight: Tensor, layer_scale: Tensor | None
) -> Tensor | None:
    """Drawn as the stock module draws it, so that the same seed keeps the same samples.

    The stock mask has the dtype of the branch it multiplies, and 1 / keep_prob is rounded to that dtype.
    """
    if drop_path is None or type(drop_path) in parts.IDENTITIES:
        return None
    if not drop_path.training or drop_path.drop_prob == 0.0:
        return None
    dtype = weight.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    if layer_scale is not None:
        dtype = torch.promote_types(dtype, layer_scale.dtype)
    keep_prob = 1 - drop_path.drop_prob
    scale = torch.empty((x.shape[0],), dtype=dtype, device=x.device).bernoulli_(keep_prob)
    if keep_prob > 0.0 and drop_path.scale_by_keep:
        scale.div_(keep_prob)
    return scale


# Block ------------------------------------------------------------------------------------------------------------


def block_unfusable(block: Module) -> str | None:
    """Why `block_forward(block, x)` would not be what `block.forward(x)` computes now, or None."""
    modules = block._modules
    for name, classes in (
        ("norm1", parts.LAYER_NORMS),
        ("norm2", parts.LAYER_NORMS),
        ("attn", parts.ATTENTIONS),
        ("mlp", parts.MLPS),
    ):
        reason = parts.unfusable(modules[name], classes)
        if reason is not None:
            return f"{name} {reason}"
    for name in ("norm1", "norm2"):
        reason = layer_norm_unfusable(modules[name])
        if reason is not None:
            return f"{name} {reason}"
    for name, classes in (
        ("ls1", parts.LAYER_SCALES),
        ("ls2", parts.LAYER_SCALES),
        ("drop_path1", parts.DROP_PATHS),
        ("drop_path2", parts.DROP_PATHS),
    ):
        module = modules.get(name)
        if not _identity(module):
            reason = parts.unfusable(module, classes)
            if reason is not None:
                return f"{name} {reason}"
    reason = attention_unfusable(modules["attn"])
    if reason is not None:
        return f"attn: {reason}"
    reason = mlp_unfusable(modules["mlp"])
    if reason is not None:
        return f"mlp: {reason}"
    return None


def block_forward(block: Module, x: Tensor) -> Tensor:
    """A pre-norm transformer block, x [B, N, D] → [B, N, D], in five operator calls.

    Without gradients in four at widths whose MLP is one operator.
    """
    modules = block._modules
    norm, attn = modules["norm1"], modules["attn"]
    proj = attn._modules["proj"]
    gamma = _gamma(modules.get("ls1"))
    first, second = _drawn(block)
    scale, kept, capacity = first or draw_drop_path(modules.get("drop_path1"), x, proj.weight, gamma)
    out, x = attend_normalised(norm, attn, x, kept, capacity)
    x = ops.linear_residual(out, proj.weight, proj.bias, x, gamma, scale, "none", kept)

    norm, mlp = modules["norm2"], modules["mlp"]
    fc1, fc2 = mlp._modules["fc1"], mlp._modules["fc2"]
    gamma = _gamma(modules.get("ls2"))
    drop_path = second or draw_drop_path(modules.get("drop_path2"), x, fc2.weight, gamma)
    activation = parts.gelu_name(mlp._modules["act"])
    return mlp_residual(x, norm, fc1, fc2, gamma, drop_path, activation, memory_of(block))


def readout_forward(block: Module, x: Tensor, readout_rows: int) -> Tensor:
    """The first R = `readout_rows` rows of `block_forward(block, x)`: x [B, N, D] → [B, R, D].

    No other row is computed beyond its part in their attention (`ops.readout_attention`).
    """
    modules = block._modules
    norm, attn = modules["norm1"], modules["attn"]
    qkv, proj = attn._modules["qkv"], attn._modules["proj"]
    gamma = _gamma(modules.get("ls1"))
    first, second = _drawn(block)
    scale = first.scale if first else draw_drop_path_scale(modules.get("drop_path1"), x, proj.weight, gamma)
    out, rows = ops.readout_attention(
        x, norm.weight, norm.bias, norm.eps, qkv.weight, qkv.bias, readout_rows, attn.num_heads, attn.scale
    )
    rows = ops.linear_residual(out, proj.weight, proj.bias, rows, gamma, scale)

    norm, mlp = modules["norm2"], modules["mlp"]
    fc1, fc2 = mlp._modules["fc1"], mlp._modules["fc2"]
    gamma = _gamma(modules.get("ls2"))
    # So few rows are not worth gathering.
    scale = second.scale if second else draw_drop_path_scale(modules.get("drop_path2"), rows, fc2.weight, gamma)
    activation = parts.gelu_name(mlp._modules["act"])
    return mlp_residual(rows, norm, fc1, fc2, gamma, DropPathDraw(scale), activation, memory_of(block))


@contextmanager
def reading(last_block: Module, rows: int) -> Iterator[None]:
    """Within, no more than the first `rows` rows of `last_block`'s result are read, and it gives no more.

    For swapped classes that ask for it (`rows_read`): their `readout_rows` is None at all other times.
    """
    last_block.readout_rows = (rows, _caller())
    try:
        yield
    finally:
        last_block.readout_rows = None


def rows_read(block: Module) -> int:
    """How many rows of this call's result are read; 0 for all."""
    if block.readout_rows is None:
        return 0
    rows, caller = block.readout_rows
    return rows if caller == _caller() else 0


def _caller() -> tuple | None:
    """What is another in another thread, and in a checkpoint: its block is called again when `reading` is over.

    None while compiling, where one graph holds both calls.
    """
    if torch.compiler.is_compiling():
        return None
    return threading.get_ident(), torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def readout_unfusable(blocks: Module, norm: Module) -> str | None:
    """Why the last of `blocks` must be computed whole although only its first rows are read, or None.

    blocks: the Sequential of them; norm: what follows it.
    """
    if not blocks._modules:
        return "there is no block"
    reason = parts.touched(blocks)
    if reason is not None:
        return f"the sequence of blocks {reason}"
    reason = parts.touched(norm)
    if reason is not None:
        return f"the last norm {reason}"
    last = blocks._modules[next(reversed(blocks._modules))]
    reason = parts.unfusable(last, parts.BLOCKS) or block_unfusable(last)
    return None if reason is None else f"the last block: {reason}"


def readout_wanted(model: Module) -> bool:
    """Whether `model` may compute its last block for the rows it reads alone (`deit_fast.swap`)."""
    return model.__dict__.get("_deit_fast_readout", True)


def compact(model: Module) -> bool:
    """Whether `model` may wait for the device once a step, to keep no room for dropped samples (`deit_fast.swap`)."""
    return model.__dict__.get("_deit_fast_compact", False)


def memory_of(block: Module) -> str:
    """What `block` keeps for backward: "balanced" or "low" (`deit_fast.swap`)."""
    return block.__dict__.get("_deit_fast_memory", "balanced")


def check_memory(memory: str) -> None:
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}; got {memory!r}")


def mlp_residual(
    x: Tensor,
    norm: Module,
    fc1: Module,
    fc2: Module,
    layer_scale: Tensor | None,
    drop_path: DropPathDraw,
    activation: str,
    memory: str,
) -> Tensor:
    """The MLP half of a block.

    Without gradients, in one operator where the whole of it fits on chip. With gradients that operator keeps no
    pre-activation and computes it again in backward: `memory="low"`. Otherwise in two operators.
    """
    scale, kept, capacity = drop_path
    whole = memory == "low" if torch.is_grad_enabled() else mlp_kernels.fits(x.shape[-1], fc1.weight.shape[0])
    if whole:
        return ops.mlp(
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            layer_scale,
            scale,
            activation,
            kept,
        )
    hidden, x = ops.layer_norm_linear_branching(
        x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, kept, capacity
    )
    return ops.linear_residual(hidden, fc2.weight, fc2.bias, x, layer_scale, scale, activation, kept)


def _gamma(layer_scale: Module | None) -> Tensor | None:
    return None if layer_scale is None or type(layer_scale) in parts.IDENTITIES else layer_scale.gamma


# Patch embedding --------------------------------------------------------------------------------------------------


def patch_embed_unfusable(patch_embed: Module) -> str | None:
    """Why the operator can't stand for the patch convolution, or None."""
    projection = patch_embed._modules["proj"]
    reason = parts.unfusable(projection, {torch.nn.Conv2d})
    if reason is not None:
        return f"proj {reason}"
    if (
        projection.stride != projection.kernel_size
        or projection.padding != (0, 0)
        or projection.dilation != (1, 1)
        or projection.groups != 1
    ):
        return "its convolution is more than a projection of patches"
    if not _identity(patch_embed._modules.get("norm")):
        return "normalizes the patches"
    return None


def patch_embed_forward(
    patch_embed: Module,
    images: Tensor,
    *,
    pos_embed: Tensor | None = None,
    cls_token: Tensor | None = None,
    dist_token: Tensor | None = None,
    mask_token: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Images [B, C, H, W] → tokens [B, R + P, D], prefix tokens and positions included (`ops.patch_embed`)."""
    projection = patch_embed._modules["proj"]
    return ops.patch_embed(
        images, projection.weight, projection.bias, pos_embed, cls_token, dist_token, mask_token, mask
    )
