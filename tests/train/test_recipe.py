"""Recipes: what comes with the package, what replaces a value, and what is refused."""

import argparse

import pytest

from deit_fast.train import recipe

pytest.importorskip("yaml")


def test_the_default_is_the_papers():
    deit = recipe.load()
    assert (deit.opt, deit.lr, deit.weight_decay, deit.epochs, deit.warmup_epochs) == ("adamw", 5e-4, 0.05, 300, 5)
    assert (deit.mixup, deit.cutmix, deit.smoothing, deit.drop_path, deit.reprob) == (0.8, 1.0, 0.1, 0.1, 0.25)
    assert deit.aa == "rand-m9-mstd0.5-inc1" and deit.repeated_aug and not deit.bce_loss


def test_deit_iii_names_what_it_changes():
    deit3 = recipe.load("deit3")
    assert (deit3.opt, deit3.aa, deit3.lr, deit3.epochs) == ("lamb", "3a", 4e-3, 800)
    assert deit3.bce_loss and deit3.unscale_lr and deit3.uniform_drop_path and deit3.repeated_aug
    assert recipe.load("deit3_21k").src and deit3.weight_decay == recipe.load().weight_decay


def test_a_file_of_ones_own_is_a_recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 1e-3\naa: none\n")  # YAML takes both for strings
    mine = recipe.load(str(path), epochs=10, warmup_epochs=0)
    assert (mine.lr, mine.aa, mine.epochs, mine.mixup) == (1e-3, None, 10, 0.8)


def test_options_have_the_original_names_and_replace_the_recipes_values():
    parser = argparse.ArgumentParser()
    recipe.add_options(parser)
    text = "--lr 1e-3 --drop-path 0 --ThreeAugment --no-repeated-aug --bce-loss --scale 0.5 1 --model-kwargs depth=3"
    given = recipe.given(parser.parse_args(text.split()))
    made = recipe.load("deit", **given)
    assert (made.lr, made.drop_path, made.aa, made.scale) == (1e-3, 0.0, "3a", (0.5, 1.0))
    assert not made.repeated_aug and made.bce_loss and made.model_kwargs == {"depth": 3}
    assert made.weight_decay == 0.05 and recipe.given(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"epochs": 2.5}, "epochs must be int"),
        ({"bce_loss": "yes"}, "bce_loss must be bool"),
        ({"scale": [1.0]}, "scale must be"),
        ({"scale": [1.0, 0.5]}, "smaller first"),
        ({"drop_path": 1.5}, "drop_path must be from 0 to 1"),
        ({"epochs": 5}, "warmup_epochs, 5, must be below epochs, 5"),
        ({"batch_size": 33}, "batch_size must be even"),
        ({"distillation_type": "medium"}, "none, soft, hard"),
        ({"distillation_tau": 3.0}, "distillation_tau .* without distillation_type soft"),
        ({"distillation_tau": 3.0, "distillation_type": "hard"}, "distillation_tau .* without distillation_type soft"),
        ({"model_ema_decay": 0.9}, "without model_ema"),
        ({"mixup": 0, "cutmix": 0, "mixup_prob": 0.5}, "without mixup or cutmix"),
        ({"src": True, "scale": [0.5, 1.0]}, "no src"),
    ],
    ids=lambda given: str(given)[:50],
)
def test_values_that_are_wrong_or_contradict_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        recipe.load(**given)


def test_unknown_recipes_and_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no recipe 'deit4': deit, deit3, deit3_21k"):
        recipe.load("deit4")
    with pytest.raises(FileNotFoundError):
        recipe.load(str(tmp_path / "none.yaml"))
    path = tmp_path / "mine.yaml"
    path.write_text("learning_rate: 1\n")
    with pytest.raises(ValueError, match="a recipe has no learning_rate"):
        recipe.load(str(path))
    path.write_text("- 1")
    with pytest.raises(ValueError, match="names and values"):
        recipe.load(str(path))


def test_each_value_is_shown_in_a_group():
    shown = dict(recipe.explained(recipe.load()))
    assert shown["model"].startswith("--model deit_small") and "--lr 0.0005" in shown["schedule"]
    assert sum(options.count("--") for options in shown.values()) == len(recipe.NAMES)
