"""The counted blocks as text."""

from evidence.clocks.block import Block, Line
from evidence.clocks.checks import Check
from evidence.clocks.page import page

GOOD = Line(
    "inference", "linear_kernel", "linear 8x8x8 bf16", 10, 1024, 64, 0, 2, 1_000_000, waves=0.04,
    clocks={"issue": 100.0, "tensor": 50.0}, flops=1024.0, l2=1.0, floor=3.0, floor_bound="memory", modelled=5.5,
    modelled_bound="latency",
)  # fmt: skip
UNCOUNTED = Line("backward", "k", "k", 1, 0, 64, 0, 2, 0, uncounted="no data sheet")


def test_sums_stand_beside_stock_and_a_launch_without_counts_has_its_reason():
    block = Block("sm_90", "small", "bf16", 256)
    text = page([(block, [GOOD, GOOD, UNCOUNTED])], [(Check("x", "H100", 200, "µs", "a paper", lambda: 0), 150.0)])
    assert "| H200 | small | bf16 | 256 | inference | 2 | 6 | 11 | 696 | 733 |" in text
    assert "| H200 | small | bf16 | 256 | backward | 1 | – | – |" in text
    assert "| no data sheet |" in text
    assert "| x | H100 | 150 | 200 | µs | a paper | -25 % |" in text


def test_other_sizes_have_no_estimate_of_stock():
    text = page([(Block("sm_90", "small", "bf16", 1), [GOOD])], [])
    assert "| H200 | small | bf16 | 1 | inference | 1 | 3 | 6 | – | – |" in text
