"""Distillation in Keras beside the PyTorch class."""

import numpy as np
import pytest
import torch
from torch import nn

keras = pytest.importorskip("keras")
pytest.importorskip("transformers")

from deit_fast.keras import TFDeiTForImageClassification, TFDeiTForImageClassificationWithTeacher  # noqa: E402
from deit_fast.transformers import DeiTForImageClassificationWithTeacher  # noqa: E402


def linear_teacher(classes=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes)).eval()


@pytest.mark.parametrize("options", [{"distillation": "hard"}, {"distillation": "soft", "tau": 3.0, "alpha": 0.3}])
def test_20_steps_have_the_losses_of_the_pytorch_class(options, config, batch, tmp_path):
    options = {**options, "teacher": linear_teacher()}
    model = TFDeiTForImageClassificationWithTeacher(config(), **options)
    model.save_pretrained(tmp_path)
    beside = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, **options).train()
    optimizer = torch.optim.SGD(beside.parameters(), 0.05)
    model.compile(keras.optimizers.SGD(0.05))
    images, labels = (torch.tensor(each) for each in batch)
    for step in range(20):
        part = slice(step % 4 * 5, step % 4 * 5 + 5)
        loss = beside(images[part], labels=labels[part]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.reset_metrics()
        assert model.train_on_batch(images[part], labels[part]) == pytest.approx(loss.item(), abs=1e-3)


def test_the_loss_in_a_call_is_that_of_training_and_of_evaluation(config, batch):
    model = TFDeiTForImageClassificationWithTeacher(config(), teacher=linear_teacher())
    model.compile(keras.optimizers.SGD(0.0))
    for training, found in ((True, model.train_on_batch(*batch)), (False, model.evaluate(*batch, verbose=0))):
        assert model(batch[0], labels=batch[1], training=training).loss.item() == pytest.approx(found, abs=1e-5)


def test_the_teacher_is_asked_in_training_alone_and_is_no_part_of_the_model(config, batch, tmp_path):
    teacher, asked = linear_teacher(), []
    teacher.register_forward_hook(lambda *_: asked.append(torch.is_inference_mode_enabled()))
    model = TFDeiTForImageClassificationWithTeacher(config(), teacher=teacher, distillation="soft", tau=2.0, alpha=0.25)
    own = len([*model.torch_model.parameters()])
    assert len(model.variables) == len([*model.parameters()]) == own
    model.compile("sgd")
    model.evaluate(*batch, verbose=0)
    assert not asked
    model.fit(*batch, batch_size=10, verbose=0)
    assert asked == [True, True]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.teacher, loaded.distillation, loaded.tau, loaded.alpha) == (None, "soft", 2.0, 0.25)


def test_a_keras_model_teaches(config, batch):
    teacher = TFDeiTForImageClassification(config())
    by_model = TFDeiTForImageClassificationWithTeacher(config(), teacher=teacher)
    by_model.compile(keras.optimizers.SGD(0.0))
    given = {
        "pixel_values": batch[0],
        "labels": batch[1],
        "teacher_logits": teacher.predict(batch[0], verbose=0).logits,
    }
    expected = by_model.fit(given, verbose=0, shuffle=False).history["loss"]
    assert by_model.fit(*batch, verbose=0, shuffle=False).history["loss"] == pytest.approx(expected, abs=1e-5)


class WithoutMode(keras.Model):
    """A teacher whose own call doesn't know of training; its dropout does."""

    def __init__(self):
        super().__init__()
        self.flatten, self.dropout, self.dense = (
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(5),
        )

    def call(self, images):
        return self.dense(self.dropout(self.flatten(images)))


@pytest.mark.parametrize(
    "make", [WithoutMode, lambda: keras.Sequential([WithoutMode()])], ids=["without training", "sequential"]
)
def test_a_keras_teacher_is_in_evaluation_mode_inside_a_call(make, config, batch):
    teacher = make()
    teacher(batch[0][:1])
    model = TFDeiTForImageClassificationWithTeacher(config(), teacher, distillation="soft")
    model.compile(keras.optimizers.SGD(0.0))
    answer = teacher(batch[0], training=False)
    expected = model(batch[0], labels=batch[1], teacher_logits=answer, training=True).loss.item()
    assert model(batch[0], labels=batch[1], training=True).loss.item() == pytest.approx(expected, abs=1e-6)
    given = {"pixel_values": batch[0], "labels": batch[1]}
    assert model.fit(given, batch_size=20, verbose=0).history["loss"] == pytest.approx([expected], abs=1e-5)


@pytest.mark.filterwarnings("error:the teacher was in training mode")
def test_a_loaded_model_is_given_its_teacher_again(config, batch, tmp_path):
    teacher = TFDeiTForImageClassification(config())
    model = TFDeiTForImageClassificationWithTeacher(config(), teacher)
    model.compile(keras.optimizers.SGD(0.0))
    expected = model.fit(*batch, batch_size=20, verbose=0).history["loss"]
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.teacher = TFDeiTForImageClassification(config())
    loaded.teacher.set_weights(teacher.get_weights())
    assert loaded.fit(*batch, batch_size=20, verbose=0).history["loss"] == pytest.approx(expected, abs=1e-5)


def test_classes_of_the_teacher_are_given_by_their_numbers(config, batch):
    with pytest.raises(ValueError, match="teacher_classes must have 5 entries"):
        TFDeiTForImageClassificationWithTeacher(config(), linear_teacher(7), teacher_classes=[1, 2])
    model = TFDeiTForImageClassificationWithTeacher(config(), linear_teacher(7))
    model.compile("sgd")
    with pytest.raises(ValueError, match="the teacher has 7 classes and the model 5: give teacher_classes"):
        model.fit(*batch, verbose=0)
    model = TFDeiTForImageClassificationWithTeacher(config(), linear_teacher(7), teacher_classes=[6, 5, 4, 3, 2])
    model.compile("sgd")
    model.fit(*batch, verbose=0)


@pytest.mark.parametrize("distillation", ["hard", "none"])
def test_labels_of_minus_100_do_not_count(distillation, config, batch, tmp_path):
    options = {"teacher": linear_teacher(), "distillation": distillation}
    images, labels = batch[0], np.where(np.arange(20) % 3 == 0, -100, batch[1])
    model = TFDeiTForImageClassificationWithTeacher(config(), **options)
    model.save_pretrained(tmp_path)
    beside = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path, **options)
    model.compile(keras.optimizers.SGD(0.0))
    for training, found in (
        (True, model.train_on_batch(images, labels)),
        (False, model.evaluate(images, labels, batch_size=20, verbose=0)),
    ):
        expected = beside.train(training)(torch.tensor(images), labels=torch.tensor(labels)).loss.item()
        assert found == pytest.approx(expected, abs=1e-5)
        assert model(images, labels=labels, training=training).loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_missing_teacher_is_asked_for(config, batch):
    model = TFDeiTForImageClassificationWithTeacher(config())
    model.compile("sgd")
    with pytest.raises(ValueError, match="needs a teacher at construction or teacher_logits in the call"):
        model.fit(*batch, verbose=0)
    without = TFDeiTForImageClassificationWithTeacher(config(), distillation="none")
    without.compile("sgd")
    assert np.isfinite(without.fit(*batch, verbose=0).history["loss"]).all()


def test_sample_weights_need_a_loss_of_keras(config, batch):
    model = TFDeiTForImageClassificationWithTeacher(config(), linear_teacher())
    model.compile("sgd")
    with pytest.raises(ValueError, match="sample_weight needs a loss for each sample"):
        model.fit(*batch, sample_weight=np.ones(20), verbose=0)
