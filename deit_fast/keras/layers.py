"""Keras layers around torch modules: their parameters are the layers' variables, and their calls the modules'."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import keras
import torch
from torch import Tensor
from torch.nn import Module

from deit_fast.keras.outputs import TFBaseModelOutputWithPooling


class TorchLayer(keras.layers.Layer):
    """Calls `module`, in the mode that `training` asks for, under autocast where the layer's policy is mixed.

    A variable is named by its parameter, with `_` for each dot: `layers_0_layernorm_before_weight`.
    """

    def __init__(self, module: Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # Past torch's and Keras's own bookkeeping: the variables below are the module's parameters themselves.
        object.__setattr__(self, "module", module)
        with keras.name_scope(self.name):
            self.parameter_variables = [
                keras.Variable(parameter, trainable=parameter.requires_grad, name=name.replace(".", "_"))
                for name, parameter in module.named_parameters()
            ]
        self.built = True

    def call(self, inputs: Tensor, training: bool = False) -> Any:
        with computing(self, self.module, training):
            return self.module(inputs)


class TFDeiTMainLayer(TorchLayer):
    """The encoder, with transformers 4's arguments and output."""

    def __init__(self, module: Module, config: Any, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.config = config

    def call(  # type: ignore[override]
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        head_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
    ) -> TFBaseModelOutputWithPooling | tuple[Any, ...]:
        if bool_masked_pos is not None and self.module.embeddings.mask_token is None:
            raise ValueError("bool_masked_pos needs a model with a mask token: use_mask_token=True")
        asked = recorded(self.config, head_mask, output_attentions, output_hidden_states)
        with computing(self, self.module, training, asked["output_attentions"]):
            outputs = self.module(
                channels_first(pixel_values, self.config.num_channels),
                bool_masked_pos=bool_masked_pos,
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
                **asked,
            )
        return returned(TFBaseModelOutputWithPooling(**outputs), self.config, return_dict)


def channels_first(pixel_values: Tensor, channels: int) -> Tensor:
    """Returns [B, C, H, W] for either layout; ambiguous sizes count as channels first.

    Raises:
        ValueError: the sizes fit neither layout.
    """
    shape = tuple(pixel_values.shape)
    if len(shape) == 4 and shape[1] == channels:
        return pixel_values
    if len(shape) == 4 and shape[3] == channels:
        return pixel_values.permute(0, 3, 1, 2)
    raise ValueError(
        f"pixel_values must be [batch, {channels}, height, width] or [batch, height, width, {channels}], got {shape}"
    )


def recorded(
    config: Any, head_mask: None, output_attentions: bool | None, output_hidden_states: bool | None
) -> dict[str, bool]:
    """What a call records: by its arguments, else by the configuration."""
    if head_mask is not None:
        raise NotImplementedError("the DeiT modules of transformers 5 take no head_mask: leave head_mask out")
    return {
        "output_attentions": config.output_attentions if output_attentions is None else output_attentions,
        "output_hidden_states": config.output_hidden_states if output_hidden_states is None else output_hidden_states,
    }


def returned(outputs: Any, config: Any, return_dict: bool | None) -> Any:
    return outputs if (config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()


@contextmanager
def computing(
    layer: keras.layers.Layer, module: Module, training: bool, output_attentions: bool = False
) -> Iterator[None]:
    """`module` is in training mode or not; it computes in the layer's dtype; eager attention gives its weights."""
    training = bool(training)
    # Each module: a layer of the model may have been called by itself since.
    if any(each.training is not training for each in module.modules()):
        module.train(training)
    with _autocast(layer, module), _eager(module.config) if output_attentions else nullcontext():
        yield


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    chosen = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _autocast(layer: keras.layers.Layer, module: Module) -> AbstractContextManager:
    if layer.compute_dtype == layer.variable_dtype:
        return nullcontext()  # whatever the program itself has chosen
    parameter = next(module.parameters(), torch.empty(0))
    return torch.autocast(parameter.device.type, getattr(torch, layer.compute_dtype))
