"""transformers 4's TensorFlow DeiT classes as Keras models. What they compute with are its PyTorch modules, swapped."""

import json
import os
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import keras
import torch
from torch import Tensor
from transformers.models.deit import modeling_deit
from transformers.models.deit.configuration_deit import DeiTConfig

from deit_fast.keras.layers import TFDeiTMainLayer, TorchLayer, channels_first, computing, recorded, returned
from deit_fast.keras.losses import average, classification_losses, masked_image_loss
from deit_fast.keras.outputs import TFBaseModelOutputWithPooling, TFImageClassifierOutput, TFMaskedImageModelingOutput
from deit_fast.keras.pretrained import load_weights, read_config, read_weights, split_arguments
from deit_fast.swap import swap

Model = TypeVar("Model", bound="TFDeiTPreTrainedModel")


class TFDeiTPreTrainedModel(keras.Model):
    """What the four have in common: weights, saving, and how Keras trains on their outputs.

    The first argument of a call may be a dictionary of all of them. `fit` and `evaluate` take the labels as `y` or in
    that dictionary. Without a loss in `compile` they use the model's own; a loss and metrics that are given to
    `compile` are of the first output: logits, reconstruction or last hidden state. `predict` gives the outputs, as
    arrays, without their loss.
    """

    config_class = DeiTConfig
    base_model_prefix = "deit"
    main_input_name = "pixel_values"
    # transformers' class, and its modules that are layers here: none where it is itself the encoder.
    torch_class: ClassVar[Any]
    heads: ClassVar[tuple[str, ...]] = ()
    # Attributes that neither Keras nor torch is to take for parts of the model.
    _apart: ClassVar[tuple[str, ...]] = ("torch_model",)

    _output_class: ClassVar[Any]

    torch_model: Any

    def __init__(self, config: DeiTConfig, *, arguments: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config = config
        self._arguments = arguments or {}
        model = self.torch_class(config, **self._arguments)
        model.to(keras.ops.zeros(()).device, getattr(torch, self.variable_dtype))
        swap(model)
        self.torch_model = model
        encoder = model.deit if self.heads else model
        # Keras's trainer knows a variable by its path: without the model's name two models' would be one.
        with keras.name_scope(self.name):
            self.deit: Any = TFDeiTMainLayer(encoder, config, name="deit", dtype=self.dtype_policy)
            for head in self.heads:
                setattr(self, head, TorchLayer(getattr(model, head), name=head, dtype=self.dtype_policy))
        self.built = True

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._parts() and hasattr(self, name):
            raise AttributeError(
                f"{name} can't be replaced: the model computes with the module that it has. For a head of other "
                f"classes: from_pretrained(…, num_labels=…, ignore_mismatched_sizes=True)"
            )
        if name in self._apart:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def _parts(cls) -> tuple[str, ...]:
        """The attributes that are layers."""
        return ("deit", *cls.heads)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], Mapping):
            args, kwargs = args[1:], {**args[0], **kwargs}
        return super().__call__(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        config: DeiTConfig | None = None,
        ignore_mismatched_sizes: bool = False,
        from_pt: bool = False,
        **kwargs: Any,
    ) -> Model:
        """A model with the weights of a folder, or of a name on the hub.

        They are looked for as safetensors, as a PyTorch checkpoint, which is read as weights only, and as
        `tf_model.h5`; each may be in shards.

        Args:
            ignore_mismatched_sizes: a head of another shape than the checkpoint's starts at random.
            from_pt: of transformers 4; every format is found without it.
            kwargs: of the configuration (`num_labels`, …), of the hub (`revision`, `token`, …) or of the class.

        Raises:
            ValueError: weights missing, unexpected or misshapen, all of them listed; another architecture.
            OSError: there is no such model, or no weights.
        """
        hub, of_keras, kwargs = split_arguments(kwargs)
        if config is None:
            config, kwargs = read_config(pretrained_model_name_or_path, hub, kwargs)
        checkpoint = read_weights(pretrained_model_name_or_path, hub)
        model = cls(config, **of_keras, **kwargs)
        prefix = "" if cls.heads else "deit."
        parameters = {prefix + name: parameter for name, parameter in model.torch_model.named_parameters()}
        load_weights(parameters, checkpoint, ignore_mismatched_sizes)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Writes `model.safetensors` and `config.json`, for this class and for transformers' and ours for PyTorch.

        kwargs: those of transformers' `save_pretrained`.
        """
        self.torch_model.save_pretrained(save_directory, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = json.loads(self.config.to_json_string(use_diff=False))
        frozen = [part for part in self._parts() if not getattr(self, part).trainable]
        return {**super().get_config(), "config": config, "frozen": frozen, **self._arguments}

    @classmethod
    def from_config(cls: type[Model], config: dict[str, Any], custom_objects: Any = None) -> Model:
        config = dict(config)
        frozen = config.pop("frozen", ())
        model = cls(DeiTConfig.from_dict(config.pop("config")), **config)
        for part in cls._parts():
            if part in frozen:
                getattr(model, part).trainable = False
        return model

    def train_step(self, data: Any) -> Any:
        return super().train_step(_with_labels_apart(data))

    def test_step(self, data: Any) -> Any:
        return super().test_step(_with_labels_apart(data))

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Keras's own call before the first step."""
        if data_batch is not None:
            return super()._symbolic_build(data_batch=_with_labels_apart(data_batch))
        batches = ((begin, end, [_with_labels_apart(next(iter(data)))]) for begin, end, data in iterator)
        return super()._symbolic_build(iterator=batches)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        y = _labels(y)
        if isinstance(self.loss, Mapping):
            raise ValueError("compile(loss=…) takes one loss, which is of the first output, and no dictionary")
        if self.loss is not None:
            return super().compute_loss(x, y, first_output(y_pred), sample_weight, training)
        if not isinstance(y_pred, Mapping):
            raise ValueError("the model's own loss needs outputs with names: return_dict=True in the configuration")
        if y_pred.get("loss") is not None:
            loss, y = y_pred["loss"], None
        elif y is not None:
            given = dict(x) if isinstance(x, Mapping) else {"pixel_values": x}
            given, y = keras.tree.map_structure(keras.ops.convert_to_tensor, (given, y))
            loss = self._loss_of(given, y, y_pred, training)
        else:
            raise ValueError(f"{type(self).__name__}: no labels, and no loss in compile()")
        if sample_weight is not None:
            weights = keras.ops.convert_to_tensor(sample_weight, loss.dtype)
            if loss.shape != weights.shape:
                raise ValueError("sample_weight needs a loss for each sample: give one to compile()")
            loss = loss * weights
        return average(loss, y, self.config) + sum(self.losses)

    def _loss_of(self, x: Mapping[str, Any], y: Tensor, outputs: Any, training: bool) -> Tensor:
        """Where the call has not computed it: its labels came apart from its arguments."""
        raise ValueError(f"{type(self).__name__} has no loss of its own for labels: give one to compile()")

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        return super().compute_metrics(x, _labels(y), first_output(y_pred), sample_weight)

    def predict_step(self, data: Any) -> Any:
        outputs = super().predict_step(data)
        if not isinstance(outputs, Mapping):
            return outputs
        return {name: value for name, value in outputs.items() if name != "loss"}

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return self._named(super().predict(*args, **kwargs))

    def predict_on_batch(self, x: Any) -> Any:
        return self._named(super().predict_on_batch(x))

    def _named(self, outputs: Any) -> Any:
        return self._output_class(**outputs) if isinstance(outputs, Mapping) else outputs


def first_output(outputs: Any) -> Any:
    """The one that labels are compared with."""
    if not isinstance(outputs, Mapping):  # return_dict=False in the configuration
        return outputs[0]
    return next(value for name, value in outputs.items() if name != "loss")


def _with_labels_apart(data: Any) -> tuple[Any, Any, Any]:
    """A batch whose `x` has no labels: a call would compute its own loss with them, in the call's dtype."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    if isinstance(x, Mapping):
        y = x.get("labels") if y is None else y
        x = {name: value for name, value in x.items() if name != "labels"}
    return x, y, sample_weight


def _labels(y: Any) -> Any:
    if not isinstance(y, Mapping):
        return y
    if set(y) != {"labels"}:
        raise ValueError(f"y is the labels, or a dictionary of labels alone; this one has {', '.join(map(str, y))}")
    return y["labels"]


def registered(cls: type) -> type:
    return keras.saving.register_keras_serializable(package="deit_fast")(cls)


@registered
class TFDeiTModel(TFDeiTPreTrainedModel):
    """The encoder alone. add_pooling_layer, use_mask_token: as transformers' classes have them."""

    torch_class = modeling_deit.DeiTModel
    _output_class = TFBaseModelOutputWithPooling

    def __init__(
        self, config: DeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False, **kwargs: Any
    ) -> None:
        arguments = {"add_pooling_layer": add_pooling_layer, "use_mask_token": use_mask_token}
        super().__init__(config, arguments=arguments, **kwargs)

    def call(
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
        """pixel_values: [B, C, H, W] or [B, H, W, C]; bool_masked_pos: [B, patches], True where masked."""
        return self.deit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            interpolate_pos_encoding=interpolate_pos_encoding,
            training=training,
        )


@registered
class TFDeiTForMaskedImageModeling(TFDeiTPreTrainedModel):
    """The encoder with a decoder that reconstructs masked patches. Its own loss needs `bool_masked_pos` alone.

    As transformers 4's class it decodes all tokens but the first and the last, of which the first is the
    distillation token; transformers 5's PyTorch class decodes the patches.
    """

    torch_class = modeling_deit.DeiTForMaskedImageModeling
    heads = ("decoder",)
    _output_class = TFMaskedImageModelingOutput

    def call(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        head_mask: None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
    ) -> TFMaskedImageModelingOutput | tuple[Any, ...]:
        """pixel_values: [B, C, H, W] or [B, H, W, C]; bool_masked_pos: [B, patches], True where masked."""
        outputs = self.deit(
            pixel_values,
            bool_masked_pos=bool_masked_pos,
            head_mask=head_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            interpolate_pos_encoding=interpolate_pos_encoding,
            training=training,
        )
        tokens = outputs.last_hidden_state[:, 1:-1]
        side = int(tokens.shape[1] ** 0.5)
        decoder: Any = self.decoder
        reconstruction = decoder(tokens.mT.unflatten(-1, (side, side)), training=training)
        loss = None
        if bool_masked_pos is not None:
            images = channels_first(pixel_values, self.config.num_channels)
            loss = masked_image_loss(images, reconstruction, bool_masked_pos)
        answer = TFMaskedImageModelingOutput(loss, reconstruction, outputs.hidden_states, outputs.attentions)
        return returned(answer, self.config, return_dict)


class TFDeiTClassifier(TFDeiTPreTrainedModel):
    """What the two classifiers have in common."""

    def classify(
        self,
        pixel_values: Tensor,
        head_mask: None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        interpolate_pos_encoding: bool,
        training: bool,
    ) -> Any:
        """By the whole module, whose last layer computes the rows that its heads read alone."""
        asked = recorded(self.config, head_mask, output_attentions, output_hidden_states)
        with computing(self, self.torch_model, training, asked["output_attentions"]):
            return self.torch_model(
                channels_first(pixel_values, self.config.num_channels),
                interpolate_pos_encoding=interpolate_pos_encoding,
                return_dict=True,
                **asked,
            )


@registered
class TFDeiTForImageClassification(TFDeiTClassifier):
    """The encoder with a linear layer on the class token. Its own loss is transformers' for `config.problem_type`."""

    torch_class = modeling_deit.DeiTForImageClassification
    heads = ("classifier",)
    _output_class = TFImageClassifierOutput

    def call(
        self,
        pixel_values: Tensor,
        head_mask: None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool = False,
        training: bool = False,
    ) -> TFImageClassifierOutput | tuple[Any, ...]:
        """pixel_values: [B, C, H, W] or [B, H, W, C]; labels: [B], or [B, classes] for several at once."""
        outputs = self.classify(
            pixel_values, head_mask, output_attentions, output_hidden_states, interpolate_pos_encoding, training
        )
        loss = None if labels is None else classification_losses(outputs.logits, labels, self.config)
        answer = TFImageClassifierOutput(loss, outputs.logits, outputs.hidden_states, outputs.attentions)
        return returned(answer, self.config, return_dict)

    def _loss_of(self, x: Mapping[str, Any], y: Tensor, outputs: Any, training: bool) -> Tensor:
        return classification_losses(outputs.logits, y, self.config)
