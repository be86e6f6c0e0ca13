"""The estimate of stock."""

import pytest

from evidence.clocks import stock
from evidence.clocks.gpus import A100, H200, RTX_4090


@pytest.mark.parametrize("gpu", [H200, A100, RTX_4090], ids=lambda gpu: gpu.name)
def test_compiled_stock_is_faster_than_eager_and_wider_blocks_take_longer(gpu):
    steps = {kind: [stock.estimate(gpu, width, kind) for width in (192, 384, 768)] for kind in ("compiled", "eager")}
    for compiled, eager in zip(steps["compiled"], steps["eager"], strict=True):
        assert all(compiled[step] < eager[step] for step in compiled)
    for step in ("inference", "backward"):
        times = [estimate[step] for estimate in steps["compiled"]]
        assert times == sorted(times)


def test_no_estimate_for_other_widths():
    assert not stock.known(H200, 1024)
