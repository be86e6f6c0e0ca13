"""The four classes beside transformers 4's own, and what Keras does with a model."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

keras = pytest.importorskip("keras")
pytest.importorskip("transformers")

import deit_fast.keras as tf_names  # noqa: E402
from deit_fast import report, transformers  # noqa: E402
from deit_fast.train import digits  # noqa: E402

CLASSES = [
    "TFDeiTModel",
    "TFDeiTForMaskedImageModeling",
    "TFDeiTForImageClassification",
    "TFDeiTForImageClassificationWithTeacher",
]
each_class = pytest.mark.parametrize("name", CLASSES)


def arrays(outputs):
    return {
        name: (torch.stack(value) if isinstance(value, tuple) else value).detach().numpy()
        for name, value in outputs.items()
    }


def first(outputs):
    return outputs.to_tuple()[0].detach()


# Calls


@each_class
def test_outputs_are_those_of_transformers_4(name, reference):
    folder, given, expected = reference(name)
    model = getattr(tf_names, name).from_pretrained(folder)
    outputs = model(**given, output_hidden_states=True, output_attentions=True)
    assert list(outputs) == list(expected["fields"])
    for field, value in arrays(outputs).items():
        assert value.shape == expected[field].shape, field
        np.testing.assert_allclose(value, expected[field], rtol=0, atol=1e-4, err_msg=field)
    as_tuple = model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert [str(tuple(each.shape)) for each in as_tuple] == list(expected["tuple_shapes"])


@each_class
def test_images_may_have_their_channels_last_and_arguments_may_be_a_dictionary(name, reference):
    folder, given, _ = reference(name)
    model = getattr(tf_names, name).from_pretrained(folder)
    channels_last = {**given, "pixel_values": given["pixel_values"].transpose(0, 2, 3, 1)}
    expected = model(**given)
    torch.testing.assert_close(first(model(channels_last)), first(expected), rtol=1e-5, atol=1e-5)
    assert len(model(given, output_hidden_states=True).hidden_states) == 3


def test_images_of_other_channels_are_refused(config):
    model = tf_names.TFDeiTModel(config())
    with pytest.raises(ValueError, match=r"must be \[batch, 3, height, width\] or .*got \(2, 4, 16, 16\)"):
        model(torch.zeros(2, 4, 16, 16))


def test_a_head_mask_is_refused(config):
    model = tf_names.TFDeiTModel(config())
    with pytest.raises(NotImplementedError, match="leave head_mask out"):
        model(torch.zeros(1, 3, 16, 16), head_mask=torch.ones(2, 4))


def test_attentions_leave_no_trace(config):
    model = tf_names.TFDeiTForImageClassification(config())
    chosen = model.config._attn_implementation
    model(torch.zeros(1, 3, 16, 16), output_attentions=True)
    assert model.config._attn_implementation == chosen != "eager"


def test_positions_are_interpolated_for_other_sizes(config):
    model = tf_names.TFDeiTModel(config())
    assert model(torch.zeros(1, 3, 24, 24), interpolate_pos_encoding=True).last_hidden_state.shape == (1, 38, 24)


def test_calls_run_on_the_operators(config, batch, triton_backend):
    model = tf_names.TFDeiTForImageClassification(config(hidden_size=32, num_attention_heads=1))
    model(batch[0][:1])
    calls = report(model.torch_model)
    assert calls.stock == {} and calls.calls["deit.layers.1"].fused == 1


def test_dropout_is_active_in_training_alone(config, batch):
    model = tf_names.TFDeiTModel(config(hidden_dropout_prob=0.5))
    calm, again = first(model(batch[0])), first(model(batch[0], training=False))
    assert torch.equal(calm, again) and not torch.equal(first(model(batch[0], training=True)), calm)


def test_a_model_is_a_layer_of_another(config, batch):
    images = keras.Input((3, 16, 16))
    logits = keras.layers.Dense(2)(tf_names.TFDeiTModel(config())(images).pooler_output)
    assert keras.Model(images, logits).predict(batch[0], verbose=0).shape == (20, 2)


class Twins(keras.Model):
    """The sum of two models' first outputs."""

    def __init__(self, models):
        super().__init__()
        self.one, self.other = models

    def call(self, images, training=False):
        return sum(model(images, training=training).pooler_output for model in (self.one, self.other))


def in_a_functional_model(models):
    images = keras.Input((3, 16, 16))
    return keras.Model(images, keras.layers.Add()([model(images).pooler_output for model in models]))


@pytest.mark.parametrize("together", [Twins, in_a_functional_model])
def test_two_models_in_another_are_both_trained(together, config, batch):
    models = [tf_names.TFDeiTModel(config()) for _ in range(2)]
    models[1].set_weights(models[0].get_weights())
    before = models[0].get_weights()
    model = together(models)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(batch[0], np.ones((20, 24)), batch_size=10, verbose=0)
    one, other = (model.get_weights() for model in models)
    for mine, its in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-6)
    assert any((old != new).any() for old, new in zip(before, one, strict=True))


def test_the_mode_is_that_of_each_call_whichever_layer_was_called_before(config, batch):
    model = tf_names.TFDeiTForImageClassification(config(hidden_dropout_prob=0.5))
    for training in (False, True):
        model(batch[0], training=training)
        model.deit(batch[0], training=not training)
        one, other = (first(model(batch[0], training=training)) for _ in range(2))
        assert torch.equal(one, other) is not training
        model(batch[0], training=not training)
        one, other = (first(model.deit(batch[0], training=training)) for _ in range(2))
        assert torch.equal(one, other) is not training


# Keras: layers, saving, policies


@each_class
def test_a_keras_file_brings_the_model_back(name, config, batch, tmp_path):
    model = getattr(tf_names, name)(config(layer_norm_eps=1e-5))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model) and loaded.config.layer_norm_eps == 1e-5
    assert torch.equal(first(loaded(batch[0])), first(model(batch[0])))


def test_a_keras_file_keeps_arguments_and_optimizer(config, batch, tmp_path):
    model = tf_names.TFDeiTModel(config(), add_pooling_layer=False, use_mask_token=True)
    model.compile("adam", "mse")
    model.fit(batch[0], np.zeros((20, 18, 24)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.torch_model.pooler is None and loaded.torch_model.embeddings.mask_token is not None
    assert loaded.optimizer.iterations == model.optimizer.iterations > 0


def test_weights_and_optimizer_go_to_a_model_of_another_name(config, batch, tmp_path):
    model = tf_names.TFDeiTForImageClassification(config())
    model.compile("adam")
    model.fit(*batch, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other = type(model).from_config({**model.get_config(), "name": "other"})
    other.compile("adam")
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "model.weights.h5")
    assert other.variables[0].path.startswith("other/deit/")
    pairs = zip(model.variables + model.optimizer.variables, other.variables + other.optimizer.variables, strict=True)
    assert all((one.numpy() == another.numpy()).all() for one, another in pairs)


@each_class
def test_pytorch_classes_load_what_is_saved(name, config, batch, tmp_path):
    model = getattr(tf_names, name)(config())
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = getattr(transformers, name.removeprefix("TF")).from_pretrained(tmp_path).eval()
    expected = {key: value for key, value in loaded.state_dict().items()}
    assert all(torch.equal(value, expected[key]) for key, value in model.torch_model.state_dict().items())
    again = getattr(tf_names, name).from_pretrained(tmp_path)
    assert torch.equal(first(again(batch[0])), first(model(batch[0])))


def test_a_frozen_encoder_keeps_its_weights(config, batch):
    model = tf_names.TFDeiTForImageClassification(config())
    model.deit.trainable = False
    trained = [f"{model.name}/classifier/weight", f"{model.name}/classifier/bias"]
    assert [variable.path for variable in model.trainable_variables] == trained
    before = [variable.numpy().copy() for variable in model.variables]
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(*batch, verbose=0)
    pairs = zip(model.variables, before, strict=True)
    assert {variable.path for variable, old in pairs if (variable.numpy() != old).any()} == set(trained)


@each_class
def test_frozen_layers_stay_frozen_in_a_keras_file(name, config, tmp_path):
    model = getattr(tf_names, name)(config())
    part = model.heads[-1] if model.heads else "deit"
    getattr(model, part).trainable = False
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [each.trainable for each in loaded.variables] == [each.trainable for each in model.variables]
    assert not getattr(loaded, part).trainable and bool(loaded.heads) is loaded.deit.trainable


@pytest.mark.parametrize("part", ["deit", "classifier"])
def test_a_layer_is_not_replaced_in_silence(part, config):
    model = tf_names.TFDeiTForImageClassification(config())
    kept = getattr(model, part)
    with pytest.raises(AttributeError, match=f"{part} can't be replaced.*ignore_mismatched_sizes=True"):
        setattr(model, part, keras.layers.Dense(7))
    assert getattr(model, part) is kept


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_keeps_float32_weights_and_trains(policy, config, batch, tmp_path):
    model = tf_names.TFDeiTForImageClassification(config(), dtype=policy)
    model.compile(keras.optimizers.Adam(3e-3))
    losses = model.fit(*batch, batch_size=10, epochs=8, verbose=0).history["loss"]
    logits = model(batch[0]).logits
    assert losses[-1] < losses[0] and {variable.dtype for variable in model.variables} == {"float32"}
    assert logits.dtype == getattr(torch, policy.removeprefix("mixed_"))
    model.save(tmp_path / "model.keras")
    assert torch.equal(keras.saving.load_model(tmp_path / "model.keras")(batch[0]).logits, logits)


# Training


class Losses(keras.callbacks.Callback):
    """Each step's."""

    def __init__(self):
        super().__init__()
        self.of_steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs):
        self.of_steps.append(logs["loss"])


def pytorch_losses(model, images, labels, rate=0.05):
    optimizer, losses = torch.optim.SGD(model.parameters(), rate), []
    for start in [*range(0, 20, 5)] * 5:
        part = slice(start, start + 5)
        loss = model.train()(torch.tensor(images[part]), labels=torch.tensor(labels[part])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_falls_as_the_pytorch_class_does(config, batch, tmp_path):
    model = tf_names.TFDeiTForImageClassification(config())
    model.save_pretrained(tmp_path)
    beside = transformers.DeiTForImageClassification.from_pretrained(tmp_path)
    losses = Losses()
    model.compile(keras.optimizers.SGD(0.05))
    model.fit(*batch, batch_size=5, epochs=5, shuffle=False, verbose=0, callbacks=[losses])
    assert len(losses.of_steps) == 20
    np.testing.assert_allclose(losses.of_steps, pytorch_losses(beside, *batch), atol=1e-3)


def test_a_loss_and_metrics_of_keras_are_of_the_logits(config, batch):
    model = tf_names.TFDeiTForImageClassification(config())
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    history = model.fit(*batch, validation_data=batch, verbose=0).history
    assert set(history) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    found = model.evaluate(*batch, verbose=0, return_dict=True)
    assert found == pytest.approx({key: history[f"val_{key}"][0] for key in found}, abs=1e-5)
    predicted = model.predict(batch[0], verbose=0).logits
    assert isinstance(predicted, np.ndarray)
    assert found["accuracy"] == pytest.approx((predicted.argmax(1) == batch[1]).mean())


@pytest.mark.parametrize("own_loss", [True, False])
def test_data_comes_as_arrays_dictionaries_or_a_loader(own_loss, config, batch):
    model = tf_names.TFDeiTForImageClassification(config())
    model.compile("sgd", None if own_loss else keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    images, labels = batch
    tensors = torch.utils.data.TensorDataset(torch.tensor(images), torch.tensor(labels))
    ways = [
        {"x": images, "y": labels},
        {"x": {"pixel_values": images, "labels": labels}},
        {"x": torch.utils.data.DataLoader(tensors, batch_size=10)},
        {"x": images.transpose(0, 2, 3, 1), "y": {"labels": labels}},
    ]
    losses = [model.evaluate(**way, verbose=0) for way in ways]
    np.testing.assert_allclose(losses, losses[0], atol=1e-5)
    for way in ways:
        model.fit(**way, verbose=0, shuffle=False)


@pytest.mark.parametrize("name", ["TFDeiTForImageClassification", "TFDeiTForMaskedImageModeling"])
def test_a_loss_of_keras_takes_labels_of_any_kind_from_the_dictionary(name, config, batch):
    model = getattr(tf_names, name)(config())
    one_hot = np.eye(5, dtype=np.int64)[batch[1]]
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    given, y = {"pixel_values": batch[0]}, one_hot
    if name == "TFDeiTForMaskedImageModeling":
        given["bool_masked_pos"] = np.ones((20, 16), bool)
        y, loss = batch[0], keras.losses.MeanSquaredError()
    model.compile("sgd", loss)
    expected = loss(y, torch.tensor(next(iter(model.predict(given, verbose=0).values())))).item()
    assert model.evaluate({**given, "labels": y}, verbose=0) == pytest.approx(expected, abs=1e-5)
    history = model.fit({**given, "labels": y}, batch_size=20, verbose=0).history
    assert history["loss"] == pytest.approx([expected], abs=1e-5)


def test_dictionaries_of_losses_or_of_other_targets_are_refused(config, batch):
    model = tf_names.TFDeiTForImageClassification(config())
    images, labels = batch
    model.compile("sgd", metrics=["accuracy"])
    with pytest.raises(ValueError, match="y is the labels, or a dictionary of labels alone; this one has y"):
        model.fit(images, {"y": labels}, verbose=0)
    model.compile("sgd", {"logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True)})
    for y in (labels, {"labels": labels}):
        with pytest.raises(ValueError, match="takes one loss, which is of the first output, and no dictionary"):
            model.fit(images, y, verbose=0)


def test_labels_in_the_dictionary_keep_their_dtype(config, batch):
    model = tf_names.TFDeiTForImageClassification(config(num_labels=1), dtype="mixed_bfloat16")
    model.compile("sgd")
    values = 1000 + np.arange(20, dtype=np.float32) / 8
    found = model.evaluate({"pixel_values": batch[0], "labels": values}, verbose=0)
    assert found == pytest.approx(model.evaluate(batch[0], values, verbose=0), rel=1e-6)
    logits = model(batch[0]).logits.detach().float().numpy()[:, 0]
    assert found == pytest.approx(((logits - values) ** 2).mean(), rel=1e-6)


def test_data_comes_from_tensorflow(config, batch):
    tensorflow = pytest.importorskip("tensorflow")
    model = tf_names.TFDeiTForImageClassification(config())
    model.compile("sgd")
    dataset = tensorflow.data.Dataset.from_tensor_slices(batch).batch(10)
    model.fit(dataset, verbose=0)
    assert model.evaluate(dataset, verbose=0) == pytest.approx(model.evaluate(*batch, verbose=0), abs=1e-5)


def test_digits_are_learned_from_batches_without_end(config):
    pytest.importorskip("sklearn")

    def prepared(split: digits.Split) -> np.ndarray:
        """[N, 3, 16, 16], from -1 to 1."""
        return np.tile(split.pixels[:, None].repeat(2, axis=2).repeat(2, axis=3) / np.float32(127.5) - 1, (1, 3, 1, 1))

    def batches(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        generator = np.random.default_rng(0)
        while True:
            chosen = generator.choice(len(images), 64, replace=False)
            yield images[chosen], labels[chosen]

    train, test = digits.load()
    model = tf_names.TFDeiTForImageClassification(config(num_labels=10))
    model.compile(keras.optimizers.Adam(5e-3), metrics=["accuracy"])
    before = model.evaluate(prepared(test), test.labels, verbose=0)
    model.fit(batches(prepared(train), train.labels), steps_per_epoch=100, verbose=0)
    loss, accuracy = model.evaluate(prepared(test), test.labels, verbose=0)
    assert loss < 0.85 * before[0] and accuracy > 2 * before[1]


def test_samples_have_their_weights_in_the_models_own_loss(config, batch):
    model = tf_names.TFDeiTForImageClassification(config())
    model.compile("sgd")
    first_half = np.r_[np.full(10, 2.0), np.zeros(10)]
    expected = model.evaluate(batch[0][:10], batch[1][:10], verbose=0)
    assert model.evaluate(*batch, sample_weight=first_half, verbose=0) == pytest.approx(expected, abs=1e-5)
    model.reset_metrics()
    assert model.train_on_batch(*batch, sample_weight=first_half) == pytest.approx(expected, abs=1e-5)


def test_labels_of_minus_100_do_not_count(config, batch, tmp_path):
    images, labels = batch[0], np.where(np.arange(20) % 3 == 0, -100, batch[1])
    model = tf_names.TFDeiTForImageClassification(config())
    model.save_pretrained(tmp_path)
    beside = transformers.DeiTForImageClassification.from_pretrained(tmp_path).eval()
    expected = beside(torch.tensor(images), labels=torch.tensor(labels)).loss.item()
    model.compile(keras.optimizers.SGD(0.0))
    assert model.evaluate(images, labels, batch_size=20, verbose=0) == pytest.approx(expected, abs=1e-5)
    assert model.fit(images, labels, batch_size=20, verbose=0).history["loss"] == pytest.approx([expected], abs=1e-5)
    assert model.evaluate(images, np.full(20, -100), verbose=0) == 0


def test_masked_images_are_learned_without_labels(config, batch):
    model = tf_names.TFDeiTForMaskedImageModeling(config())
    model.compile(keras.optimizers.Adam(3e-3))
    masked = {"pixel_values": batch[0], "bool_masked_pos": np.random.default_rng(0).random((20, 16)) < 0.5}
    losses = model.fit(masked, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert model.predict(masked, verbose=0).reconstruction.shape == (20, 3, 16, 16)


def test_a_model_without_a_loss_says_what_it_needs(config, batch):
    model = tf_names.TFDeiTModel(config())
    model.compile("sgd")
    with pytest.raises(ValueError, match="TFDeiTModel has no loss of its own for labels"):
        model.fit(batch[0], np.zeros((20, 18, 24)), verbose=0)
    with pytest.raises(ValueError, match="no labels"):
        model.fit(batch[0], verbose=0)
