"""Python and dispatcher time of swapped timm models; a process of its own, without Triton's interpreter."""

from tests.support.compiled import printed_by

# What is claimed of `deit-fast bench --suite host`.
MOST = {"inference": 0.65, "forward and backward": 0.8}
# The least of several measurements, on either side: other tests run beside it.
BLOCK = f"""
import json
from deit_fast.benchmark.host import block_times
MOST, least = {MOST}, {{}}
for _ in range(16):
    for t in block_times(rounds=9, calls=10):
        stock, swapped = least.get(t.step, (t.stock, t.swapped))
        least[t.step] = min(stock, t.stock), min(swapped, t.swapped)
    ratios = {{step: swapped / stock for step, (stock, swapped) in least.items()}}
    if all(ratios[step] <= MOST[step] for step in MOST):
        break
print(json.dumps(ratios))
"""
# Not compiled: of what is measured the test sees no more than that it is there.
ALL = """
import json
from functools import partial
from deit_fast.benchmark import host
from deit_fast.check.standin_driver import recording
host.current_device = partial(recording, compiling=False)
print(json.dumps([[t.what, t.step, t.stock, t.swapped] for t in host.host_times(rounds=1, calls=1)]))
"""


def test_a_swapped_block_asks_no_more_of_the_host_than_stocks():
    ratios = printed_by("-c", BLOCK)
    assert ratios.keys() == MOST.keys()
    assert {step: ratio for step, ratio in ratios.items() if ratio > MOST[step]} == {}


def test_every_operator_a_block_and_a_model_are_measured_forward_and_backward():
    from deit_fast.check.cases import OPS

    found = printed_by("-c", ALL)
    whats = {*OPS, "block", "model"} - {"keep_samples", "normalise_pixels"}
    assert sorted(map(tuple, (each[:2] for each in found))) == sorted((what, step) for what in whats for step in MOST)
    assert all(stock > 0 and swapped > 0 for *_, stock, swapped in found)
