"""The classifiers of DeiT and ViT, which compute their last layer for the rows that they read alone."""

import functools
from collections.abc import Callable
from typing import Any

from torch.nn import Module
from transformers.models.deit import modeling_deit
from transformers.models.vit import modeling_vit

from deit_fast.nn import parts
from deit_fast.nn.options import readout_wanted
from deit_fast.nn.parts import Part
from deit_fast.nn.readout import reading
from deit_fast.swap.rules import Mixin, register
from deit_fast.swap.transformers.layer import last_layer_unfusable

_MODELS: set[type] = {modeling_deit.DeiTModel, modeling_vit.ViTModel}


def readout_unfusable(classifier: Part) -> str | None:
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
    return last_layer_unfusable(layers[-1])


class _Classifier(Mixin):
    """Marks a swapped classifier; each has a forward of its own, with the stock signature that the Trainer reads."""


def _reading(rows: int, stock: type[Module]) -> Callable:
    """`stock.forward`, in which the last layer gives no more than its first `rows` rows.

    The model between the two hands them on unchanged: to its norm, which works by rows.
    """

    @functools.wraps(stock.forward)
    def forward(self: Part, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, _Classifier):
            return type(self).forward(self, *args, **kwargs)
        if readout_unfusable(self) is not None:
            return stock.forward(self, *args, **kwargs)
        last = self._modules[self.base_model_prefix]._modules["layers"][-1]
        with reading(last, rows):
            return stock.forward(self, *args, **kwargs)

    return forward


class DeiTForImageClassification(_Classifier, modeling_deit.DeiTForImageClassification):
    forward = _reading(1, modeling_deit.DeiTForImageClassification)


class DeiTForImageClassificationWithTeacher(_Classifier, modeling_deit.DeiTForImageClassificationWithTeacher):
    forward = _reading(2, modeling_deit.DeiTForImageClassificationWithTeacher)


class ViTForImageClassification(_Classifier, modeling_vit.ViTForImageClassification):
    forward = _reading(1, modeling_vit.ViTForImageClassification)


for _stock, _swapped in (
    (modeling_deit.DeiTForImageClassification, DeiTForImageClassification),
    (modeling_deit.DeiTForImageClassificationWithTeacher, DeiTForImageClassificationWithTeacher),
    (modeling_vit.ViTForImageClassification, ViTForImageClassification),
):
    register(_stock, _swapped, lambda classifier: None, readout_unfusable=readout_unfusable)
