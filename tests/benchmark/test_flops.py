"""Counted FLOPs are those of textbook formulas, on stock operators and ours."""

from contextlib import nullcontext

import pytest
import torch

from deit_fast.benchmark.flops import WithoutProducts, flop_counter, step_flops
from deit_fast.ops import backend
from evidence.models import build, images
from evidence.recipes import KeptSamples


def test_stock_attention_on_the_cpu_counts_as_torch_counts_it_on_a_gpu():
    q, k, v = (torch.randn(2, 3, 10, 32, requires_grad=True) for _ in range(3))
    with flop_counter() as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    product = 2 * 2 * 3 * 10 * 10 * 32
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def model(drop_path: float, swapped: bool):
    from timm.layers import DropPath

    import deit_fast

    model = build("timm", "tiny", 3).train()
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(drop_path), DropPath(drop_path)
    if swapped:
        deit_fast.swap(model)
    return model


@pytest.mark.parametrize("swapped", [False, True])
def test_products_left_out_change_no_count(swapped):
    pixels = images(4, torch.float32)
    counts = []
    for left_out in (False, True):
        with backend.forced("torch"), WithoutProducts() if left_out else nullcontext():
            torch.manual_seed(0)
            counts.append(step_flops(model(0.5, swapped), pixels))
    assert counts[0] == counts[1] > 0


def test_a_swapped_step_computes_only_what_is_kept_and_read():
    pixels = images(8, torch.float32)
    with backend.forced("torch"), WithoutProducts(), KeptSamples() as samples:
        stock = step_flops(model(0.0, swapped=False), pixels)
        whole = step_flops(model(0.0, swapped=True), pixels)
        assert samples.drawn == 0
        some = step_flops(model(0.5, swapped=True), pixels)
    # Two blocks with two branches each; the last block has no rows worth packing.
    assert samples.drawn == 4 * 8
    assert 0 < samples.kept < samples.drawn
    assert some < whole < stock
