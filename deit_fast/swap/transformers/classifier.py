"""The classifiers of DeiT and ViT, which compute their last layer for the rows that they read alone."""

from typing import Any

from torch.nn import Module
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast.nn import parts
from deit_fast.nn.options import readout_wanted
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import last_norm_unfusable, reading, used_again
from deit_fast.swap.rules import Method, register
from deit_fast.swap.transformers.layer import last_layer_unfusable

_MODELS: parts.Classes = {}
parts.add(_MODELS, modeling_deit.DeiTModel, modeling_vit.ViTModel)
# How many rows of its last layer each reads.
_ROWS: dict[type[Module], int] = {
    modeling_deit.DeiTForImageClassification: 1,
    modeling_deit.DeiTForImageClassificationWithTeacher: 2,
    modeling_vit.ViTForImageClassification: 1,
}


def readout_unfusable(classifier: Part) -> str | None:
    """Why the last layer is computed for all tokens in a call of the classifier, or None."""
    if not readout_wanted(classifier):
        return "readout=False"
    model = classifier._modules[classifier.base_model_prefix]
    modules = model._modules
    reason = parts.unfusable(model, _MODELS)
    if reason is not None:
        return f"the model {reason}"
    if model.pooler is not None:
        return "a pooler reads the last layer"
    layers = modules["layers"]
    if not layers._modules:
        return "there is no layer"
    last = layers[-1]
    if used_again(layers, last):
        return "the last layer is used more than once"
    return last_norm_unfusable(modules["layernorm"]) or last_layer_unfusable(last)


def _call(classifier: Part, *args: Any, **kwargs: Any) -> str | None:
    return readout_unfusable(classifier)


def _forward(classifier: Part, *args: Any, **kwargs: Any) -> Any:
    """Stock's, in which the last layer gives no more than the rows that are read.

    The model between the two hands them on unchanged: to its norm, which works by rows.
    """
    stock = classifier._deit_fast_stock
    last = classifier._modules[classifier.base_model_prefix]._modules["layers"][-1]
    with reading(last, _ROWS[stock]):
        return stock.forward(classifier, *args, **kwargs)


for _stock in _ROWS:
    register(
        _stock,
        lambda classifier: None,
        {"forward": Method(_call, _forward)},
        readout_unfusable=readout_unfusable,
    )
