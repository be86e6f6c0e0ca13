"""`swap`'s options of our own models: what each is for, and that none changes a value."""

import pytest
import torch

from deit_fast import create_model, ops
from deit_fast.check.saved_bytes import saved_bytes
from deit_fast.models import VisionTransformer
from deit_fast.nn import options
from deit_fast.ops import backend

NAME = "deit_tiny_distilled_patch16_224"


def step(config, monkeypatch, **asked):
    """Bytes kept for backward, loss, gradients and the next random number, on the operators."""
    torch.manual_seed(0)
    model = VisionTransformer(config, drop_path_rate=0.9, **asked).train()
    images = torch.randn(16, 3, 32, 32)
    # As on a GPU: what drop path keeps is not known without waiting, and operators keep what they need.
    monkeypatch.setattr(ops, "known_count", lambda kept: None)
    with backend.forced("torch"):
        torch.manual_seed(1)
        kept = saved_bytes(model, lambda: torch.cat(model(images)))
        torch.manual_seed(1)
        loss = torch.cat(model(images)).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
    return kept, loss, gradients, torch.rand(1)


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [({"memory": "low"}, 0, 0.9), ({"readout": False}, 1.05, 9), ({"compact_drop_path": True}, 0, 0.9)],
    ids=str,
)
def test_an_option_changes_what_is_kept_and_no_value(asked, least, most, small_config, monkeypatch):
    config = small_config(NAME, img_size=32, depth=4)
    kept, loss, gradients, random = step(config, monkeypatch)
    with_option, *found = step(config, monkeypatch, **asked)
    assert least * kept < with_option < most * kept
    torch.testing.assert_close(found, [loss, gradients, random], rtol=1e-4, atol=1e-4)


def test_create_model_takes_them():
    model = create_model(NAME, device="meta", memory="low", readout=False, compact_drop_path=True)
    assert {options.memory_of(block) for block in model.blocks} == {"low"}
    assert not options.readout_wanted(model) and options.compact(model)
    with pytest.raises(ValueError, match="memory must be one of balanced, low; got 'high'"):
        create_model(NAME, device="meta", memory="high")
