"""The training loop: what it learns, what it keeps, and where it stops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from deit_fast.train import loop

STEPS = 8


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def batches(broken_at: int | None = None):
    """Endless; the class is the sign of the first input. Batch `broken_at`, from 1, holds a NaN."""
    generator = torch.Generator().manual_seed(0)
    for step in itertools.count(1):
        inputs = torch.randn(16, 4, generator=generator)
        labels = (inputs[:, 0] > 0).long()
        yield (inputs * math.nan if step == broken_at else inputs), labels


def criterion(inputs, outputs, labels):
    return F.cross_entropy(outputs, labels)


def train(model, data=None, **changes) -> list[float]:
    return loop.train(model, criterion, data or batches(), **({"steps": STEPS, "lr": 0.01} | changes))


def test_a_model_learns(model):
    losses = train(model, steps=200)
    assert len(losses) == 200 and max(losses[-20:]) < 0.3 < losses[0]


def test_each_step_is_reported_with_its_loss(model):
    seen = []
    losses = train(model, on_step=lambda step, loss: seen.append((step, loss)))
    assert seen == list(enumerate(losses, start=1))


def test_no_more_batches_are_taken_than_steps(model):
    data = batches()
    train(model, data)
    expected = next(itertools.islice(batches(), STEPS, None))
    assert torch.equal(next(data)[0], expected[0])


def test_learning_rate_rises_and_falls():
    factors = [loop.lr_factor(step, steps=10, warmup_steps=3) for step in range(11)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-12) and factors[-2] > 0


def test_vectors_and_exempt_parameters_do_not_decay(model):
    model.no_weight_decay = lambda: {"2.weight"}
    decayed, others = loop._parameter_groups(model, 0.1)
    assert decayed["params"] == [model[0].weight] and decayed["weight_decay"] == 0.1
    assert len(others["params"]) == 3 and others["weight_decay"] == 0


def test_frozen_parameters_stay(model):
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model)
    assert torch.equal(model[0].weight, before)


# -- checkpoints


def test_the_trained_weights_are_saved_with_metadata(model, tmp_path):
    path = tmp_path / "model.safetensors"
    train(model, checkpoint=path, metadata={"a": "b"})
    saved = load_file(path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["a"] == "b"
    assert list(tmp_path.iterdir()) == [path]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(model, tmp_path):
    path = tmp_path / "model.safetensors"
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"nan at step 7 of 8") as caught:
        train(model, batches(broken_at=7), checkpoint=path, save_every=3)
    assert str(path) in str(caught.value) and "after step 5" in str(caught.value)
    # Steps 1 to 5 again: with the same schedule, since `steps` is the same.
    again = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    again.load_state_dict(start)
    with pytest.raises(FloatingPointError):
        train(again, batches(broken_at=6))
    saved = load_file(path)
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.state_dict().items())


def test_a_loss_that_is_not_finite_at_once_leaves_no_checkpoint(model, tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FloatingPointError, match=r"step 1 .* no checkpoint"):
        train(model, batches(broken_at=1), checkpoint=path, save_every=1)
    assert not path.exists()


def test_weights_that_the_last_step_breaks_are_not_saved(model, tmp_path):
    path = tmp_path / "model.safetensors"

    def steep(inputs, outputs, labels):
        return (0 * outputs.sum()).sqrt()  # 0, with a gradient of 0 · ∞

    with pytest.raises(FloatingPointError, match="weights are not finite after step 1;"):
        loop.train(model, steep, batches(), steps=1, lr=0.01, checkpoint=path)
    assert not path.exists()


def test_an_interrupted_save_leaves_the_checkpoint_from_before(model, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    train(model, checkpoint=path)
    before = path.read_bytes()

    def interrupted(model, filename, metadata):
        with open(filename, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, checkpoint=path)
    assert path.read_bytes() == before


# -- mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr.* must be positive"),
        ({"lr": math.nan}, "lr.* must be positive"),
        ({"warmup_steps": STEPS}, "warmup_steps .* below steps, 8"),
        ({"save_every": 0}, "save_every"),
        ({"checkpoint": "model.pth"}, r"\.safetensors file, got model\.pth"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named_before_any_work(model, changes, message):
    def untouched():
        pytest.fail("a batch was taken")
        yield

    with pytest.raises(ValueError, match=message):
        train(model, untouched(), **changes)


def test_too_few_batches_are_counted(model):
    with pytest.raises(ValueError, match="3 batches for 8 steps"):
        train(model, list(itertools.islice(batches(), 3)))
