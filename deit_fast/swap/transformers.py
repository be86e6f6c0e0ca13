"""transformers: the layers, embeddings and their parts of DeiT and ViT.

Of the PreTrainedModel classes only the classifiers change: transformers keeps what a model can record by its exact
class, and their hidden states and attentions are recorded by the model within.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn import Module
from transformers import activations
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit
from transformers.utils import output_capturing

from deit_fast import ops
from deit_fast.nn import parts
from deit_fast.nn.functional import (
    NO_DROP_PATH,
    memory_of,
    mlp_linears,
    mlp_residual,
    reading,
    readout_wanted,
    rows_read,
)
from deit_fast.swap.rules import register, stock_wanted

for _library, _prefix in ((modeling_deit, "DeiT"), (modeling_vit, "ViT")):
    if not hasattr(_library, f"{_prefix}MLP"):
        raise ImportError(f"deit_fast.swap needs transformers 5.16 or newer, found {transformers.__version__}")

# Softmax attention over all tokens, whichever backend computes it; a name that a user registered may mean anything.
_SOFTMAX_ATTENTIONS = {
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "flex_attention",
}
# Keyword arguments that a model hands down to its layers and that change nothing in them.
_HARMLESS = {"output_attentions", "output_hidden_states", "return_dict", "num_items_in_batch"}


def _plain_call(attention_mask: Tensor | None, kwargs: dict) -> bool:
    return attention_mask is None and (not kwargs or _HARMLESS.issuperset(kwargs))


# MLP --------------------------------------------------------------------------------------------------------------


def _gelu_name(activation: Module) -> str | None:
    if type(activation) is activations.GELUActivation:
        return "gelu" if activation.act is F.gelu else None
    if type(activation) is activations.GELUTanh:
        return "gelu_tanh" if isinstance(activation.act, functools.partial) else None
    return parts.gelu_name(activation)


def mlp_unfusable(mlp: Module) -> str | None:
    modules = mlp._modules
    for name in ("fc1", "fc2"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    activation = modules["activation_fn"]
    if _gelu_name(activation) is None:
        return f"its activation is not torch's GELU ({type(activation).__name__})"
    if parts.touched(activation) is not None:
        return f"activation_fn {parts.touched(activation)}"
    return None


def _mlp_forward(mlp: Module, x: Tensor) -> Tensor:
    modules = mlp._modules
    return mlp_linears(x, modules["fc1"], modules["fc2"], _gelu_name(modules["activation_fn"]))


# Attention --------------------------------------------------------------------------------------------------------


def _projections_unfusable(attention: Module) -> str | None:
    modules = attention._modules
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        reason = parts.unfusable(modules[name], parts.LINEARS)
        if reason is not None:
            return f"{name} {reason}"
    if attention.training and attention.attention_dropout > 0.0:
        return "attention dropout is active"
    if attention.is_causal:
        return "is causal"
    implementation = attention.config._attn_implementation
    if implementation not in _SOFTMAX_ATTENTIONS:
        return f"its attention implementation is {implementation!r}"
    return None


def attention_unfusable(attention: Module) -> str | None:
    reason = _projections_unfusable(attention)
    if reason is None and attention.config._attn_implementation == "eager":
        return "eager attention returns its weights"
    return reason


def _attend(attention: Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads = (*q.shape[:-1], attention.num_attention_heads, attention.head_dim)
    out, _ = ops.attention_qkv(q.view(heads), k.view(heads), v.view(heads), attention.scaling)
    return out


def _attention_forward(attention: Module, x: Tensor) -> tuple[Tensor, None]:
    modules = attention._modules
    q, k, v = (
        ops.linear(x, projection.weight, projection.bias)
        for projection in (modules["q_proj"], modules["k_proj"], modules["v_proj"])
    )
    out_proj = modules["o_proj"]
    return ops.linear(_attend(attention, q, k, v), out_proj.weight, out_proj.bias), None


def _touched(module: Module, recorded: str) -> str | None:
    """As `parts.touched`, but for the hook that one request to record outputs leaves behind for good.

    That hook records while a model that was asked to runs, and is idle at all other times. recorded: "attentions" or
    "hidden_states".
    """
    if not module._forward_hooks:
        return parts.touched(module)
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has a hook"
    if "forward" in module.__dict__:
        return "has a forward of its own on the instance"
    if not all(_captures_outputs(hook) for hook in module._forward_hooks.values()):
        return "has a hook"
    if recorded in (output_capturing._active_collector.get() or ()):
        return f"is asked for its {recorded.replace('_', ' ')}"
    return None


def _captures_outputs(hook: object) -> bool:
    return (
        getattr(hook, "__module__", None) == output_capturing.__name__
        and getattr(hook, "__name__", None) == "output_capturing_hook"
    )


# Layer ------------------------------------------------------------------------------------------------------------

_ATTENTIONS: set[type] = set()
_MLPS: set[type] = set()
_LAYERS: set[type] = set()
_MODELS: set[type] = {modeling_deit.DeiTModel, modeling_vit.ViTModel}
_LAYER_PARTS = (("layernorm_before", parts.LAYER_NORMS), ("layernorm_after", parts.LAYER_NORMS), ("mlp", _MLPS))


def layer_unfusable(layer: Module) -> str | None:
    modules = layer._modules
    for name, classes in _LAYER_PARTS:
        reason = parts.unfusable(modules[name], classes)
        if reason is not None:
            return f"{name} {reason}"
    attention = modules["attention"]
    if type(attention) not in _ATTENTIONS:
        return f"attention is a {type(attention).__name__}"
    reason = _touched(attention, "attentions")
    if reason is not None:
        return f"attention {reason}"
    reason = _projections_unfusable(attention)
    if reason is not None:
        return f"attention: {reason}"
    reason = mlp_unfusable(modules["mlp"])
    if reason is not None:
        return f"mlp: {reason}"
    if not parts.idle_dropout(modules["dropout"]):
        return "dropout is active"
    return None


def _layer_forward(layer: Module, x: Tensor) -> Tensor:
    modules = layer._modules
    norm, attention = modules["layernorm_before"], modules["attention"]
    projections = attention._modules
    q, k, v = projections["q_proj"], projections["k_proj"], projections["v_proj"]
    of_rows = (x, norm.weight, norm.bias, norm.eps, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias)
    q, k, v, x = ops.layer_norm_qkv_branching(*of_rows)
    out = _attend(attention, q, k, v)
    out_proj = projections["o_proj"]
    x = ops.linear_residual(out, out_proj.weight, out_proj.bias, x)

    return _mlp_residual(layer, x)


def _mlp_residual(layer: Module, x: Tensor) -> Tensor:
    norm, mlp = layer._modules["layernorm_after"], layer._modules["mlp"]._modules
    activation, memory = _gelu_name(mlp["activation_fn"]), memory_of(layer)
    return mlp_residual(x, norm, mlp["fc1"], mlp["fc2"], None, NO_DROP_PATH, activation, memory)


# Readout ----------------------------------------------------------------------------------------------------------


def readout_unfusable(classifier: Module) -> str | None:
    """Why the last layer is computed for all tokens in a call of the classifier, or None."""
    if not readout_wanted(classifier):
        return "readout=False"
    model = classifier._modules[classifier.base_model_prefix]
    modules = model._modules
    if type(model) not in _MODELS:
        return f"the model is a {parts.class_name(model)}"
    if model.pooler is not None:
        return "a pooler reads the last layer"
    layers = modules["layers"]
    if not layers._modules:
        return "there is no layer"
    for name, module in (("model", model), ("last norm", modules["layernorm"])):
        reason = parts.touched(module)
        if reason is not None:
            return f"the {name} {reason}"
    return _last_layer_unfusable(layers[-1])


def _last_layer_unfusable(layer: Module) -> str | None:
    if type(layer) not in _LAYERS:
        return f"the last layer is a {parts.class_name(layer)}"
    if layer.gradient_checkpointing and layer.training:
        return "the last layer is checkpointed"
    reason = _touched(layer, "hidden_states")
    if reason is not None:
        return f"the last layer {reason}"
    reason = layer_unfusable(layer)
    return None if reason is None else f"the last layer: {reason}"


def _call_with_readout(classifier: Module, readout_rows: int, forward: Callable, args: tuple, kwargs: dict) -> object:
    """`forward`, in which the last layer gives no more than the first `readout_rows` rows.

    The model between the two hands them on unchanged: to its norm, which works by rows.
    """
    if readout_unfusable(classifier) is not None:
        return forward(*args, **kwargs)
    last = classifier._modules[classifier.base_model_prefix]._modules["layers"][-1]
    with reading(last, readout_rows):
        return forward(*args, **kwargs)


def _readout_rows(layer: Module) -> int:
    """How many rows of this call's result are read; 0 for all."""
    rows = rows_read(layer)
    return rows if rows and _touched(layer, "hidden_states") is None else 0


def _layer_readout(layer: Module, x: Tensor, readout_rows: int) -> Tensor:
    modules = layer._modules
    norm, attention = modules["layernorm_before"], modules["attention"]
    projections = attention._modules
    q, k, v, out_proj = (projections[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    out, rows = ops.readout_attention_qkv(
        x, norm.weight, norm.bias, norm.eps, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias,
        readout_rows, attention.num_attention_heads, attention.scaling,
    )  # fmt: skip
    rows = ops.linear_residual(out, out_proj.weight, out_proj.bias, rows)
    return _mlp_residual(layer, rows)


# Embeddings -------------------------------------------------------------------------------------------------------

_PATCH_EMBEDDINGS: set[type] = {modeling_deit.DeiTPatchEmbeddings, modeling_vit.ViTPatchEmbeddings}


def embeddings_unfusable(embeddings: Module) -> str | None:
    patch_embeddings = embeddings._modules["patch_embeddings"]
    reason = parts.unfusable(patch_embeddings, _PATCH_EMBEDDINGS)
    if reason is not None:
        return f"patch_embeddings {reason}"
    reason = parts.unfusable(patch_embeddings._modules["projection"], {torch.nn.Conv2d})
    if reason is not None:
        return f"patch_embeddings.projection {reason}"
    if not parts.plain_parameters(embeddings):
        return "has a tensor subclass for a parameter"
    if not parts.idle_dropout(embeddings._modules["dropout"]):
        return "dropout is active"
    return None


def _embeds(embeddings: Module, pixel_values: Tensor, mask: Tensor | None, interpolate: bool | None) -> bool:
    """Whether the operator computes this call; whatever stock would refuse is left to stock, which says why."""
    if stock_wanted(pixel_values) or embeddings_unfusable(embeddings) is not None or pixel_values.ndim != 4:
        return False
    patch_embeddings = embeddings._modules["patch_embeddings"]
    batch, channels, height, width = pixel_values.shape
    patch_height, patch_width = patch_embeddings._modules["projection"].kernel_size
    if channels != patch_embeddings.num_channels or height % patch_height or width % patch_width:
        return False
    if not interpolate and (height, width) != tuple(embeddings.image_size):
        return False
    patches = (height // patch_height) * (width // patch_width)
    return mask is None or (
        mask.dtype is torch.bool and mask.shape == (batch, patches) and embeddings.mask_token is not None
    )


def _embeddings_forward(
    embeddings: Module, pixel_values: Tensor, mask: Tensor | None, interpolate: bool | None
) -> Tensor:
    projection = embeddings._modules["patch_embeddings"]._modules["projection"]
    cls_token, dist_token = embeddings.cls_token, getattr(embeddings, "distillation_token", None)
    pos_embed = embeddings.position_embeddings
    if interpolate:
        height, width = pixel_values.shape[2:]
        patches = (height // projection.kernel_size[0]) * (width // projection.kernel_size[1])
        tokens = patches + (1 if dist_token is None else 2)
        # It wants the tokens for their shape alone.
        pos_embed = embeddings.interpolate_pos_encoding(cls_token.expand(-1, tokens, -1), height, width)
    return ops.patch_embed(
        pixel_values,
        projection.weight,
        projection.bias,
        pos_embed,
        cls_token,
        dist_token,
        None if mask is None else embeddings.mask_token,
        mask,
    )


# The classes of both models ---------------------------------------------------------------------------------------


class DeiTMLP(modeling_deit.DeiTMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self, DeiTMLP):
            return type(self).forward(self, hidden_states)
        if stock_wanted(hidden_states) or mlp_unfusable(self) is not None:
            return super().forward(hidden_states)
        return _mlp_forward(self, hidden_states)


class ViTMLP(modeling_vit.ViTMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        if not isinstance(self, ViTMLP):
            return type(self).forward(self, hidden_states)
        if stock_wanted(hidden_states) or mlp_unfusable(self) is not None:
            return super().forward(hidden_states)
        return _mlp_forward(self, hidden_states)


def _runs_attention(attention: Module, x: object, attention_mask: Tensor | None, kwargs: dict) -> bool:
    return _plain_call(attention_mask, kwargs) and not stock_wanted(x) and attention_unfusable(attention) is None


class DeiTAttention(modeling_deit.DeiTAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if not isinstance(self, DeiTAttention):
            return type(self).forward(self, hidden_states, attention_mask, **kwargs)
        if not _runs_attention(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return _attention_forward(self, hidden_states)


class ViTAttention(modeling_vit.ViTAttention):
    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        if not isinstance(self, ViTAttention):
            return type(self).forward(self, hidden_states, attention_mask, **kwargs)
        if not _runs_attention(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        return _attention_forward(self, hidden_states)


def _runs_layer(layer: Module, x: object, attention_mask: Tensor | None, kwargs: dict) -> bool:
    return _plain_call(attention_mask, kwargs) and not stock_wanted(x) and layer_unfusable(layer) is None


class DeiTLayer(modeling_deit.DeiTLayer):
    readout_rows = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not isinstance(self, DeiTLayer):
            return type(self).forward(self, hidden_states, attention_mask, **kwargs)
        if not _runs_layer(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        rows = _readout_rows(self)
        return _layer_readout(self, hidden_states, rows) if rows else _layer_forward(self, hidden_states)


class ViTLayer(modeling_vit.ViTLayer):
    readout_rows = None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        if not isinstance(self, ViTLayer):
            return type(self).forward(self, hidden_states, attention_mask, **kwargs)
        if not _runs_layer(self, hidden_states, attention_mask, kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs)
        rows = _readout_rows(self)
        return _layer_readout(self, hidden_states, rows) if rows else _layer_forward(self, hidden_states)


class DeiTEmbeddings(modeling_deit.DeiTEmbeddings):
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> Tensor:
        if not isinstance(self, DeiTEmbeddings):
            return type(self).forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)
        if not _embeds(self, pixel_values, bool_masked_pos, interpolate_pos_encoding):
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        return _embeddings_forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)


class ViTEmbeddings(modeling_vit.ViTEmbeddings):
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
    ) -> Tensor:
        if not isinstance(self, ViTEmbeddings):
            return type(self).forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)
        if not _embeds(self, pixel_values, bool_masked_pos, interpolate_pos_encoding):
            return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding)
        return _embeddings_forward(self, pixel_values, bool_masked_pos, interpolate_pos_encoding)


class DeiTForImageClassification(modeling_deit.DeiTForImageClassification):
    @functools.wraps(modeling_deit.DeiTForImageClassification.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, DeiTForImageClassification):
            return type(self).forward(self, *args, **kwargs)
        return _call_with_readout(self, 1, super().forward, args, kwargs)


class DeiTForImageClassificationWithTeacher(modeling_deit.DeiTForImageClassificationWithTeacher):
    @functools.wraps(modeling_deit.DeiTForImageClassificationWithTeacher.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, DeiTForImageClassificationWithTeacher):
            return type(self).forward(self, *args, **kwargs)
        return _call_with_readout(self, 2, super().forward, args, kwargs)


class ViTForImageClassification(modeling_vit.ViTForImageClassification):
    @functools.wraps(modeling_vit.ViTForImageClassification.forward)
    def forward(self, *args, **kwargs):
        if not isinstance(self, ViTForImageClassification):
            return type(self).forward(self, *args, **kwargs)
        return _call_with_readout(self, 1, super().forward, args, kwargs)


_ATTENTIONS.update((DeiTAttention, ViTAttention))
_LAYERS.update((DeiTLayer, ViTLayer))
_MLPS.update((DeiTMLP, ViTMLP))


def _register(library: ModuleType, mlp: type, attention: type, layer: type, embeddings: type) -> None:
    for swapped, unfusable in (
        (mlp, mlp_unfusable),
        (attention, attention_unfusable),
        (layer, layer_unfusable),
        (embeddings, embeddings_unfusable),
    ):
        register(getattr(library, swapped.__name__), swapped, unfusable)


_register(modeling_deit, DeiTMLP, DeiTAttention, DeiTLayer, DeiTEmbeddings)
_register(modeling_vit, ViTMLP, ViTAttention, ViTLayer, ViTEmbeddings)
for _library, _swapped in (
    (modeling_deit, DeiTForImageClassification),
    (modeling_deit, DeiTForImageClassificationWithTeacher),
    (modeling_vit, ViTForImageClassification),
):
    register(
        getattr(_library, _swapped.__name__), _swapped, lambda classifier: None, readout_unfusable=readout_unfusable
    )
