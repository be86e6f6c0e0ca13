"""What the design promises, in operator calls, bytes at their boundaries, bytes saved for backward, and FLOPs."""

import pytest
import torch

from deit_fast.ops import backend
from evidence.models import DEPTH, SIZES
from evidence.traffic import TrafficCounter, Training, maker, measure, measure_training

# What the promises are made for; bytes of activations a token do not depend on the batch, the weights' are
# spread over it.
BATCH = 32
COUNTED_BATCH = 2


def count(function, *weights: torch.Tensor) -> TrafficCounter:
    with torch.no_grad(), TrafficCounter(list(weights)) as counter:
        function()
    return counter


def inference(library: str, size: str, precision: str, swapped: bool):
    with backend.forced("torch"):
        return measure(maker(library, size, swapped), SIZES[size][0], precision, COUNTED_BATCH)


def bytes_at_batch(traffic, batch: int) -> float:
    return traffic.activations_model + traffic.weights_model * COUNTED_BATCH / batch


def test_distinct_inputs_and_outputs_are_counted():
    x, y = torch.ones(10, 10), torch.ones(10, 10)
    counter = count(lambda: (x + y, x + x))
    assert counter.calls == {"aten::add": 2}
    assert counter.activation_bytes == (300 + 200) * 4


def test_views_and_allocations_are_free():
    x = torch.ones(4, 6)
    counter = count(lambda: (x.t(), x[1:], x.view(6, 4).expand(2, 6, 4), x.detach(), torch.empty_like(x), x.chunk(2)))
    assert counter.calls == {}
    assert counter.activation_bytes == 0


def test_an_expanded_tensor_counts_its_elements_once():
    x, y = torch.ones(1, 8).expand(100, 8), torch.ones(100, 8)
    assert count(lambda: x + y).activation_bytes == (8 + 800 + 800) * 4


def test_an_operator_in_place_both_reads_and_writes():
    x, y = torch.ones(10), torch.ones(10)
    assert count(lambda: x.add_(y)).activation_bytes == 30 * 4


def test_weights_and_their_casts_are_counted_apart():
    x, weight = torch.ones(10, 4, dtype=torch.bfloat16), torch.ones(4, 4)
    counter = count(lambda: x @ weight.bfloat16(), weight)
    assert counter.calls == {"aten::_to_copy": 1, "aten::mm": 1}
    assert counter.weight_bytes == 16 * (4 + 2 + 2)
    assert counter.activation_bytes == (40 + 40) * 2


@pytest.mark.parametrize(("precision", "calls", "d_bytes"), [("bf16", 10.7, 79), ("autocast-bf16", 21.5, 114)])
def test_stock_timm_counts_what_the_design_was_made_against(precision, calls, d_bytes):
    traffic = inference("timm", "small", precision, swapped=False)
    assert traffic.calls_model == pytest.approx(calls, abs=0.05)
    assert bytes_at_batch(traffic, BATCH) == pytest.approx(d_bytes, abs=0.5)


@pytest.mark.parametrize(("size", "calls", "d_bytes"), [("small", 5, 44.1), ("tiny", 5, 44.2)])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_swapped_model_moves_no_more_than_promised(library, size, calls, d_bytes):
    traffic = inference(library, size, "bf16", swapped=True)
    assert traffic.calls_block <= calls
    assert traffic.activations_block <= d_bytes
    assert bytes_at_batch(traffic, BATCH) <= d_bytes


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_swapped_model_computes_no_more_than_promised(library):
    stock, swapped = (inference(library, "small", "bf16", swapped) for swapped in (False, True))
    assert swapped.flops <= 0.925 * stock.flops


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_under_autocast_a_swapped_block_adds_weight_casts_only(library):
    traffic = inference(library, "small", "autocast-bf16", swapped=True)
    ours = {name: calls for name, calls in traffic.operators.items() if name != "aten::_to_copy"}
    assert sum(ours.values()) <= 5
    assert traffic.activations_block <= 56.1


# Training: a step of timm's DeiT-S at batch 32, drop path off, stock and swapped ------------------------------------


def training(precision: str, *options) -> Training:
    with backend.forced("torch"):
        return measure_training(maker("timm", "small", *options), SIZES["small"][0], precision, BATCH)


# Under autocast stock also keeps 16-bit copies of the weights, which the design spread over the batch.
WIDTH = SIZES["small"][0]
WEIGHT_COPIES = DEPTH * 12 * WIDTH**2 * 2 / 2**20 / BATCH


@pytest.mark.parametrize(
    ("precision", "d_bytes", "calls", "saved"),
    [("bf16", 254, 32, 28.5), ("autocast-bf16", 344, 56, 33.3 - WEIGHT_COPIES)],
)
def test_stock_timm_trains_at_what_the_design_was_made_against(precision, d_bytes, calls, saved):
    stock = training(precision, False)
    assert stock.bytes_model == pytest.approx(d_bytes, rel=0.02)
    assert stock.calls_model == pytest.approx(calls, rel=0.02)
    assert stock.saved_image == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize(
    ("precision", "d_bytes", "calls", "saved", "saved_low"),
    [("bf16", 146, 16, 17, 11), ("autocast-bf16", 200, 24, 22, 15)],
)
def test_a_swapped_model_trains_within_what_is_promised(precision, d_bytes, calls, saved, saved_low):
    balanced, low = training(precision, True), training(precision, True, "low")
    for found in (balanced, low):
        assert found.bytes_model <= d_bytes
        assert found.calls_model <= calls
    assert balanced.saved_image <= saved
    assert low.saved_image <= saved_low
