"""transformers' Trainer, unchanged."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import deit_fast
from tests.swap.helpers import randomise

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers.trainer_utils import load_sharded_checkpoint  # noqa: E402

from deit_fast.transformers import DeiTForImageClassificationWithTeacher  # noqa: E402
from tests.transformers.models import config, ours, same_weights, stock  # noqa: E402

CLASSES = ["DeiTForImageClassification", "DeiTForImageClassificationWithTeacher", "ViTForImageClassification"]
each_class = pytest.mark.parametrize("class_name", CLASSES)


def build(class_name: str, seed: int = 0, **options) -> nn.Module:
    if not class_name.endswith("WithTeacher"):
        return ours(class_name, seed)
    teacher = stock("ViTForImageClassification")
    return randomise(DeiTForImageClassificationWithTeacher(config(), teacher, **options), seed)


def images(count: int = 8) -> list[dict]:
    noise = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=noise), "labels": i % 10} for i in range(count)]


def trainer(model: nn.Module, folder: Path, count: int = 8, compute_metrics=None, **options) -> transformers.Trainer:
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 0.01, "optim": "sgd"} | options
    arguments = transformers.TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, max_grad_norm=0.0, **options
    )
    data = images(count)
    return transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, compute_metrics=compute_metrics
    )


@each_class
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(class_name: str, tmp_path) -> None:
    model, start = build(class_name), build(class_name)
    trainer(model, tmp_path, save_steps=2, optim="adamw_torch").train()
    assert not same_weights(model, start)
    resumed = build(class_name, seed=1)
    trainer(resumed, tmp_path, optim="adamw_torch").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same_weights(resumed, model)
    assert not deit_fast.report(resumed).stock


@each_class
def test_the_best_model_is_loaded_at_the_end(class_name: str, tmp_path) -> None:
    model, weights = build(class_name), []

    def first_is_best(_) -> dict[str, float]:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"score": -len(weights)}

    options = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 2, "eval_steps": 2}
    trainer(
        model,
        tmp_path,
        compute_metrics=first_is_best,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        **options,
    ).train()
    best, last = weights
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())
    assert not all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_in_shards_is_loaded(tmp_path) -> None:
    saved, model = build(CLASSES[1]), build(CLASSES[1], seed=1)
    saved.save_pretrained(tmp_path, max_shard_size="100KB")
    load_sharded_checkpoint(model, tmp_path, strict=False)
    assert same_weights(model, saved)


@pytest.mark.parametrize("distillation", ["hard", "soft", "none"])
def test_accumulated_gradients_are_those_of_the_large_batch(distillation: str, tmp_path) -> None:
    models = []
    for size, steps in ((5, 1), (2, 3)):  # the last of the three has one image
        models.append(build(CLASSES[1], distillation=distillation))
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer(models[-1], tmp_path, count=5, learning_rate=1.0, save_strategy="no", **options).train()
    start, (large, small) = build(CLASSES[1]).state_dict(), (model.state_dict() for model in models)
    for name, value in large.items():
        step = (value - start[name]).abs().max()
        assert (small[name] - value).abs().max() <= 1e-4 * step + 1e-6, name


@each_class
def test_predictions_are_one_array_of_logits(class_name: str, tmp_path) -> None:
    model = build(class_name).eval()
    result = trainer(model, tmp_path).predict(images(6))
    with torch.no_grad():
        expected = model(torch.stack([each["pixel_values"] for each in images(6)])).logits
    assert isinstance(result.predictions, np.ndarray)
    np.testing.assert_allclose(result.predictions, expected.numpy(), atol=1e-5)
    assert np.isfinite(result.metrics["test_loss"])


def test_teacher_logits_may_be_a_column_of_the_data(tmp_path) -> None:
    data = [{**each, "teacher_logits": torch.eye(10)[i]} for i, each in enumerate(images())]
    model = randomise(DeiTForImageClassificationWithTeacher(config()))
    run = trainer(model, tmp_path, save_strategy="no")
    run.train_dataset = data
    assert np.isfinite(run.train().training_loss)


def test_labels_that_trainer_takes_away_are_missed(tmp_path) -> None:
    with pytest.warns(UserWarning, match="label_smoothing_factor"):
        trainer(build(CLASSES[1]), tmp_path, label_smoothing_factor=0.1, max_steps=1, save_strategy="no").train()
