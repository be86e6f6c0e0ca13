"""Python and dispatcher time of swapped timm models; a process of its own, without Triton's interpreter."""

from tests.support.compiled import printed_by

PROGRAM = """
import json
from deit_fast.benchmark.host import host_times
print(json.dumps([[t.what, t.step, t.stock, t.swapped, t.ratio] for t in host_times(rounds=7, calls=10)]))
"""
# What is claimed is what `deit-fast bench --suite host` prints; here other tests run beside it. Without plans: 3.
MOST = {("block", "inference"): 1.6, ("block", "forward and backward"): 2.2}


def test_a_swapped_block_asks_no_more_of_the_host_than_stocks():
    found = {(what, step): (stock, swapped, ratio) for what, step, stock, swapped, ratio in printed_by("-c", PROGRAM)}
    assert {what for what, _ in found} == {"block", "model"}
    assert all(stock > 0 and swapped > 0 for stock, swapped, _ in found.values())
    assert {key: found[key][2] for key, most in MOST.items() if found[key][2] > most} == {}
