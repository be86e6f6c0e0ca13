"""What says that a module may be computed from its parameters: the `*_unfusable` of each.

All run at every call, where hooks, train/eval or replaced parts may have changed the answer. They read timm's attribute
names, so they serve `deit_fast.nn` and the swapped modules of timm alike, and they read `_modules` directly, which
costs a tenth of attribute access.
"""

from typing import Any

from deit_fast.nn import parts
from deit_fast.nn.parts import Part

MANY_DIMENSIONS = "normalizes over more than one dimension"


def layer_norm_unfusable(norm: Part) -> str | None:
    """Why LayerNorm's operator can't stand for `norm.forward`, or None."""
    if len(norm.normalized_shape) != 1:
        return MANY_DIMENSIONS
    if not parts.plain_parameters(norm):
        return "has a tensor subclass for a parameter"
    return None


def attention_unfusable(attn: Part) -> str | None:
    """Why `attention_forward(attn, x)` would not be what `attn.forward(x)` computes now, or None."""
    modules = attn._modules
    for name in ("qkv", "proj"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    if not parts.is_identity(modules.get("q_norm")) or not parts.is_identity(modules.get("k_norm")):
        return "normalizes queries and keys"
    if not parts.is_identity(modules.get("norm")):
        return "normalizes the attention output"
    if modules.get("gate") is not None:
        return "gates the attention output"
    if not parts.idle_dropout(modules["attn_drop"]) or not parts.idle_dropout(modules["proj_drop"]):
        return "dropout is active"
    # What timm hands to the fused function hangs on the attention's own mode.
    if attn.training and getattr(modules["attn_drop"], "p", 0.0) > 0.0:
        return "dropout is active"
    head_dim = attn.__dict__.get("head_dim")
    if head_dim is not None and parts.out_features(modules["qkv"]) not in (3 * attn.num_heads * head_dim, None):
        return "its heads are not what its qkv gives"
    if not attn.__dict__.get("fused_attn") and not isinstance(attn.scale, (float, int)):
        return "its scale is no plain number"
    return None


def softmax_scale(attn: Part) -> Any:
    """What scores are multiplied by: timm's fused path takes 1/√d whatever `scale` says, its other path `scale`."""
    state = attn.__dict__
    return state["head_dim"] ** -0.5 if state.get("fused_attn") else attn.scale


def mlp_unfusable(mlp: Part) -> str | None:
    """Why `mlp_forward(mlp, x)` would not be what `mlp.forward(x)` computes now, or None."""
    modules = mlp._modules
    for name in ("fc1", "fc2"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    activation = modules["act"]
    if parts.gelu_name(activation) is None:
        return f"its activation is {parts.class_name(activation)}, not GELU"
    reason = parts.unfusable(activation, parts.ACTIVATIONS)
    if reason is not None:
        return f"act {reason}"
    if not parts.is_identity(modules.get("norm")):
        return "normalizes the hidden layer"
    if not parts.idle_dropout(modules["drop1"]) or not parts.idle_dropout(modules["drop2"]):
        return "dropout is active"
    return None


def block_unfusable(block: Part) -> str | None:
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
        # Its parameters have been asked about already.
        if len(modules[name].normalized_shape) != 1:
            return f"{name} {MANY_DIMENSIONS}"
    for name, classes in (
        ("ls1", parts.LAYER_SCALES),
        ("ls2", parts.LAYER_SCALES),
        ("drop_path1", parts.DROP_PATHS),
        ("drop_path2", parts.DROP_PATHS),
    ):
        module = modules.get(name)
        if not parts.is_identity(module):
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


def patch_embed_unfusable(patch_embed: Part) -> str | None:
    """Why the operator can't stand for the patch convolution, or None."""
    projection = patch_embed._modules["proj"]
    reason = parts.unfusable(projection, parts.CONVOLUTIONS)
    if reason is not None:
        return f"proj {reason}"
    if (
        projection.stride != projection.kernel_size
        or projection.padding != (0, 0)
        or projection.dilation != (1, 1)
        or projection.groups != 1
    ):
        return "its convolution is more than a projection of patches"
    if not parts.is_identity(patch_embed._modules.get("norm")):
        return "normalizes the patches"
    return None
