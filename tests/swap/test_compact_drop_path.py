"""`swap(model, compact_drop_path=True)`: where the host must be asked how many samples are kept, it is asked once."""

import pytest
import torch
from torch import Tensor, nn

from deit_fast import ops, swap
from deit_fast.ops import backend
from tests.swap.helpers import assert_same_gradients, gradients, randomise

timm = pytest.importorskip("timm")
from timm.layers import DropPath  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402


def vit(**options) -> nn.Module:
    """DeiT III's kind of stochastic depth: one rate in every block."""
    options = {"embed_dim": 64, "depth": 3, "num_heads": 1, "num_classes": 10, "drop_path_rate": 0.7} | options
    model = randomise(VisionTransformer(img_size=32, patch_size=8, **options)).train()
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.7), DropPath(0.7)
    return model


@pytest.fixture
def no_host(monkeypatch) -> None:
    """As on a GPU: what is kept is not known without waiting."""
    monkeypatch.setattr(ops, "known_count", lambda kept: None)


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor, int]:
    """Logits, gradients, the next random number, and the bytes kept for backward."""
    kept: dict[int, int] = {}

    parameters = {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(torch.linspace(-1, 1, 8 * 3 * 32 * 32).view(8, 3, 32, 32))
    found = gradients(model, logits.square().sum())
    return logits, found, torch.rand(1), sum(kept.values())


def test_no_room_is_kept_for_dropped_samples_and_no_value_changes(no_host) -> None:
    model = vit()
    logits, stock, random, _ = step(model)
    swap(model)
    # As on a GPU: left to themselves, a CPU's operators keep what stock PyTorch keeps.
    with backend.forced("torch"):
        *_, roomy = step(model)
        swap(model, compact_drop_path=True)
        compact_logits, found, compact_random, compact = step(model)
    torch.testing.assert_close(compact_logits, logits, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, stock)
    assert torch.equal(compact_random, random)
    assert compact < 0.6 * roomy


def test_the_counts_are_read_in_one_go(no_host, monkeypatch) -> None:
    model = vit()
    swap(model, compact_drop_path=True)
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self.shape) or tolist(self))
    model(torch.zeros(8, 3, 32, 32))
    assert reads == [(6,)]


def test_nothing_is_left_for_the_next_call(no_host) -> None:
    model = vit()
    swap(model, compact_drop_path=True)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.zeros(8, 5, 32, 32))
    model(torch.zeros(8, 3, 32, 32))
    assert not any("_deit_fast_drawn" in module.__dict__ for module in model.modules())


def test_checkpointed_blocks_draw_as_ever(no_host) -> None:
    model = vit()
    logits, stock, random, _ = step(model)
    swap(model, compact_drop_path=True)
    model.set_grad_checkpointing()
    checkpointed, found, next_random, _ = step(model)
    torch.testing.assert_close(checkpointed, logits, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, stock)
    assert torch.equal(next_random, random)
