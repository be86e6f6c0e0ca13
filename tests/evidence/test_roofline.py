"""The page's counts are those of a swapped model as it runs, and its arithmetic is that of the roofline."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch

from deit_fast.benchmark.devices import Device, device
from deit_fast.benchmark.flops import WithoutProducts, flop_counter
from deit_fast.benchmark.outputs import summed
from deit_fast.models.registry import get_config
from deit_fast.ops import backend
from evidence.models import IMAGE_SIZE, SIZES, images
from evidence.roofline import BATCH, GPUS, NAMES, PAGE, PEERS, Call, Cost, bound, calls, figure, page
from evidence.traffic import TrafficCounter, maker

# Two blocks as all but the last are, and the last.
DEPTH, COUNTED_BATCH = 3, 3


class ByOperator(TrafficCounter):
    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__(weights)
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.activation_bytes + self.weight_bytes
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.bytes[func._schema.name] += self.activation_bytes + self.weight_bytes - before
        return result


@cache
def counted(size: str, training: bool) -> tuple[ByOperator, int]:
    """Calls and bytes by operator, and operations, of timm's model as it runs swapped."""
    with torch.device("meta"):
        model = maker("timm", size, True)(DEPTH)
    model = model.to_empty(device="cpu").to(torch.bfloat16).train(training)
    pixels = images(COUNTED_BATCH, torch.bfloat16)
    counter = ByOperator([*model.parameters(), *model.buffers()])
    with backend.forced("torch"), WithoutProducts(), torch.set_grad_enabled(training), counter, flop_counter() as flops:
        logits = summed(model(pixels))
        if training:
            logits.backward()
    return counter, flops.get_total_flops()


def formulas(size: str, training: bool) -> list[Call]:
    return calls(replace(get_config(f"deit_{size}_distilled_patch16_{IMAGE_SIZE}"), depth=DEPTH), training)


def total_bytes(found: list[Call]) -> int:
    return sum(call.times * (COUNTED_BATCH * call.cost.activations + call.cost.weights) for call in found)


every_step = pytest.mark.parametrize(
    ("size", "training"), [(size, training) for size in SIZES for training in (False, True)]
)


@every_step
def test_operations_are_those_that_the_flop_counter_counts(size, training):
    _, flops = counted(size, training)
    assert COUNTED_BATCH * sum(call.times * call.cost.flops for call in formulas(size, training)) == flops


@every_step
def test_calls_and_bytes_of_each_operator_are_those_that_traffic_counts(size, training):
    counter, _ = counted(size, training)
    ours = [call for call in formulas(size, training) if call.part != "classifiers"]
    times, moved = Counter(), Counter()
    for call in ours:
        times[f"deit_fast::{call.operator}"] += call.times
        moved[f"deit_fast::{call.operator}"] += total_bytes([call])
    assert times == {name: n for name, n in counter.calls.items() if name.startswith("deit_fast::")}
    assert moved == {name: n for name, n in counter.bytes.items() if name.startswith("deit_fast::")}
    assert total_bytes([c for c in formulas(size, training) if c.operator == "linear"]) == counter.bytes["aten::addmm"]


@every_step
def test_what_the_formulas_leave_out_is_little(size, training):
    counter, _ = counted(size, training)
    formula = total_bytes(formulas(size, training))
    assert formula <= counter.bytes.total() <= 1.03 * formula


def test_a_bound_is_the_longer_of_operations_and_bytes():
    gpu = Device("", bf16=2, tf32=None, fp32=1, bandwidth=500, source="")
    cost = Cost(flops=4 * 10**12, activations=3 * 10**11, weights=4 * 10**11)
    assert cost.bytes(batch=2) == 5 * 10**11
    assert cost.seconds(gpu, batch=2) == (4, 2)
    more_bytes = replace(cost, activations=10**12)
    assert bound([Call("", "", 3, cost), Call("", "", 1, more_bytes)], gpu, batch=2) == 3 * 4 + 4.8


def test_figures_have_three_significant_digits():
    values = (0, 0.012345, 1.2345, 12.345, 1234.5)
    assert [figure(value) for value in values] == ["0", "0.0123", "1.23", "12.3", "1,230"]


@pytest.mark.parametrize("size", SIZES)
def test_what_others_measured_is_within_the_bound_of_the_same_model(size):
    """Their models compute more than ours: were one of them faster, the bound would be wrong."""
    config = get_config(f"deit_{size}_distilled_patch16_{IMAGE_SIZE}")
    gpus = {device(name).name: device(name) for name in GPUS}
    (rate, gpu), *others = [(peer[4], gpus[peer[1]]) for peer in PEERS if peer[0] == f"{NAMES[size]}, inference"]
    assert not others
    assert rate < BATCH / bound(calls(config, training=False), gpu, BATCH)


def test_the_committed_page_is_what_the_script_writes():
    """After a change: `python -m evidence.roofline`."""
    assert PAGE.read_text(encoding="utf-8") == page()


def test_images_of_any_shape_cost_what_their_patches_do() -> None:
    square = get_config("deit_tiny_patch16_224")
    wide = replace(square, img_size=(112, 448))  # as many patches, and as many pixels
    assert calls(wide, training=True) == calls(square, training=True)
