"""FlopCounterMode on the operators and on swapped models: what is computed, no more."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deit_fast import ops, swap
from deit_fast.ops import backend
from tests.swap.helpers import randomise

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

D, HIDDEN, TOKENS, HEADS, BATCH, CLASSES, PATCHES, PATCH_VALUES = 64, 256, 17, 2, 4, 10, 16, 192


def model(**options) -> nn.Module:
    built = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=D, depth=2, num_heads=HEADS, num_classes=CLASSES, **options
    )
    return randomise(built)


def count(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def block(samples: int) -> int:
    return samples * (2 * TOKENS * D * (4 * D + 2 * HIDDEN) + 4 * TOKENS * TOKENS * D)


AROUND = BATCH * (2 * PATCHES * D * PATCH_VALUES + 2 * D * CLASSES)


def test_a_swapped_models_inference() -> None:
    vit, x = model().eval(), torch.randn(BATCH, 3, 32, 32)
    swap(vit)
    # Three projections of the row that is read, two products of all rows with a query a head, and the row's own rest.
    readout = BATCH * (2 * 3 * D * D + 2 * 2 * HEADS * TOKENS * D + 2 * D * D + 2 * 2 * D * HIDDEN)
    with torch.no_grad():
        assert count(lambda: vit(x)) == AROUND + block(BATCH) + readout
        swap(vit, readout=False)
        assert count(lambda: vit(x)) == AROUND + 2 * block(BATCH)


def test_dropped_samples_are_not_counted() -> None:
    vit, x = model().train(), torch.randn(BATCH, 3, 32, 32)
    swap(vit, readout=False)
    whole = count(lambda: vit(x).sum().backward())
    # Forward and backward of everything but the image's gradient: a product has two more in backward, attention five
    # in place of its two.
    attention = 2 * BATCH * 4 * TOKENS * TOKENS * D
    products = AROUND + 2 * block(BATCH) - attention
    images = BATCH * 2 * PATCHES * D * PATCH_VALUES
    assert whole == 3 * products - images + attention * 7 // 2
    for module in vit.blocks:
        module.drop_path1 = module.drop_path2 = timm.layers.DropPath(1 - 1e-9)
    assert count(lambda: vit(x).sum().backward()) == 3 * AROUND - images


def test_only_the_gradients_asked_for_are_counted() -> None:
    x, weight = torch.randn(5, D), torch.randn(HIDDEN, D, requires_grad=True)
    product = 2 * 5 * D * HIDDEN
    assert count(lambda: ops.linear(x, weight).sum().backward()) == 2 * product
    x.requires_grad_()
    assert count(lambda: ops.linear(x, weight).sum().backward()) == 3 * product


def test_attention_backwards_kernels_compute_two_products_twice() -> None:
    qkv = torch.randn(1, TOKENS, 3, 1, 32, requires_grad=True)
    product = 2 * TOKENS * TOKENS * 32
    for chosen, products in (("torch", 2 + 5), ("triton", 2 + 7)):
        with backend.forced(chosen):
            assert count(lambda: ops.attention([qkv], 1.0)[0].sum().backward()) == products * product
