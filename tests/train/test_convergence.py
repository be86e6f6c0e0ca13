"""Sixty optimizer steps on handwritten digits, stock and swapped from one seed."""

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.swap import swap
from tests.swap.helpers import randomise

timm = pytest.importorskip("timm")
datasets = pytest.importorskip("sklearn.datasets")
from timm.models.deit import VisionTransformerDistilled  # noqa: E402

STEPS, BATCH = 60, 32
# Stock and swapped add up in another order; what they agree on is far below what training is noisy by.
LOSS_DIFFERENCE = 1e-3
# The yardstick: timm's own two attention paths, which differ by their order of summation alone.
WEIGHTS_FACTOR = 2.0
BFLOAT16_LOSS = 0.02


def build(width: int, drop_path_rate: float = 0.1, seed: int = 0) -> nn.Module:
    """A distilled DeiT, two blocks, heads of 64, drop path, both classifiers trained.

    Weights start at unit gain. From timm's own start so narrow a model has flat attention, whose gradients AdamW
    scales up from near rounding: within 60 steps timm's two attention paths then part by up to 0.2 in the loss.
    """
    model = VisionTransformerDistilled(
        img_size=32,
        patch_size=8,
        embed_dim=width,
        depth=2,
        num_heads=width // 64,
        num_classes=10,
        drop_path_rate=drop_path_rate,
    )
    model.set_distilled_training(True)
    return randomise(model, seed).train()


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1,797 digits of 8 × 8 pixels, enlarged to 32 × 32, three channels, values in [-1, 1]."""
    data = datasets.load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return F.interpolate(images, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1), torch.tensor(data.target)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = digits()
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        yield images[chosen], labels[chosen]


def train(
    model: nn.Module, *, autocast: bool = False, dtype: torch.dtype = torch.float32
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of every step and the final weights."""
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    losses = []
    # Drop path masks.
    torch.manual_seed(0)
    for images, labels in batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            heads = model(images.to(dtype))
        loss = sum(F.cross_entropy(logits.float(), labels) for logits in heads) / len(heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


@functools.cache
def train_stock(width: int, *, drop_path_rate: float = 0.1, seed: int = 0, fused_attention: bool = True, **options):
    model = build(width, drop_path_rate, seed)
    for block in model.blocks:
        block.attn.fused_attn = fused_attention
    return train(model, **options)


def train_swapped(
    width: int, memory: str, *, drop_path_rate: float = 0.1, seed: int = 0, readout: bool = True, **options
):
    model = build(width, drop_path_rate, seed)
    assert not swap(model, memory=memory, readout=readout).kept
    return train(model, **options)


def largest_difference(losses: list[float], expected: list[float]) -> float:
    return max(abs(ours - stock) for ours, stock in zip(losses, expected, strict=True))


def relative_differences(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """|w − w_expected| / |w_expected|. The key bias, whose true gradient is zero, is a random walk: left out."""
    differences = {}
    for name, stock in expected.items():
        ours = weights[name]
        if name.endswith("qkv.bias"):
            ours, stock = (torch.cat((bias.chunk(3)[0], bias.chunk(3)[2])) for bias in (ours, stock))
        differences[name] = ((ours - stock).norm() / stock.norm()).item()
    return differences


def overall_difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    differences = relative_differences(weights, expected)
    sizes = {name: expected[name].norm().item() for name in expected}
    absolute = sum((differences[name] * sizes[name]) ** 2 for name in expected)
    return (absolute / sum(size**2 for size in sizes.values())) ** 0.5


@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_losses_and_weights_follow_stock_in_float32(memory: str) -> None:
    losses, weights = train_stock(128)
    assert losses[-1] < losses[0] / 3, "nothing was learned"
    explicit_losses, explicit_weights = train_stock(128, fused_attention=False)
    # The readout block adds up in another order than either of them: it has its own yardstick below.
    swapped_losses, swapped_weights = train_swapped(128, memory, readout=False)

    assert largest_difference(swapped_losses, losses) < LOSS_DIFFERENCE
    assert largest_difference(explicit_losses, losses) < LOSS_DIFFERENCE, "the yardstick itself has diverged"
    allowed = relative_differences(explicit_weights, weights)
    found = relative_differences(swapped_weights, weights)
    too_far = {name: (found[name], allowed[name]) for name in found if found[name] > WEIGHTS_FACTOR * allowed[name]}
    assert not too_far, f"relative differences of final weights, swapped and allowed: {too_far}"


def test_work_left_out_leaves_losses_and_weights_as_right_as_stocks() -> None:
    """Rows that nobody reads and samples that drop path drops: against the same training in float64."""
    options = {"drop_path_rate": 0.2}
    errors = []
    # Two starts: in a single one AdamW's steps near a zero gradient part by chance.
    for seed in (0, 1):
        exact_losses, exact = train_stock(128, seed=seed, dtype=torch.float64, **options)
        runs = (
            train_stock(128, seed=seed, **options),
            train_stock(128, seed=seed, fused_attention=False, **options),
            train_swapped(128, "balanced", seed=seed, **options),
        )
        assert largest_difference(runs[2][0], runs[0][0]) < LOSS_DIFFERENCE
        assert largest_difference(runs[2][0], exact_losses) < LOSS_DIFFERENCE
        errors.append([overall_difference(weights, exact) for _, weights in runs])
    stock, explicit, ours = (sum(error**2 for error in run) ** 0.5 for run in zip(*errors, strict=True))
    assert ours < WEIGHTS_FACTOR * max(stock, explicit)


@pytest.mark.parametrize("memory", ["balanced", "low"])
def test_the_final_loss_in_bfloat16_autocast_is_stocks(memory: str) -> None:
    """Width 64: at 128 and this step size the last batch's loss says nothing.

    There timm's two attention paths differ by up to 5 % in it, and stock in float32 from stock in autocast by 9 %.
    """
    losses, _ = train_stock(64, autocast=True)
    explicit_losses, _ = train_stock(64, fused_attention=False, autocast=True)
    swapped_losses, _ = train_swapped(64, memory, autocast=True)
    assert explicit_losses[-1] == pytest.approx(losses[-1], rel=BFLOAT16_LOSS), "the yardstick itself has diverged"
    assert swapped_losses[-1] == pytest.approx(losses[-1], rel=BFLOAT16_LOSS)
    assert sum(swapped_losses[-10:]) == pytest.approx(sum(losses[-10:]), rel=BFLOAT16_LOSS)
