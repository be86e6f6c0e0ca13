import pytest
import torch

from deit_fast.kernels import drop_path
from tests.support.compare import DTYPES, strided
from tests.support.guard import Guard


def expected(scale):
    is_kept = scale != 0
    samples = torch.arange(len(scale), dtype=torch.int32)
    return torch.cat([is_kept.sum(dtype=torch.int32).view(1), samples[is_kept], samples[~is_kept]])


def check(scale):
    guard = Guard()
    banded = guard(scale)
    with guard.outputs():
        kept = drop_path.keep_samples(banded)
    guard.assert_untouched()
    assert kept.dtype is torch.int32
    assert torch.equal(kept, expected(scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", (0, 1, 2, 16, 17, 100))
def test_kept_then_dropped_samples_in_order(batch, dtype):
    for rate in (0.0, 0.3, 1.0):
        check(torch.full((batch,), 1.25, dtype=dtype) * (torch.rand(batch) >= rate))


def test_more_samples_than_a_block():
    for batch in (1024, 1025, 2500):
        check((torch.rand(batch) >= 0.5).float())


def test_any_scale_but_zero_keeps_its_sample():
    check(torch.tensor([0.0, -0.0, -1.0, 1e-40, torch.inf, torch.nan]))
    check(strided(torch.tensor([0.0, 2.0, 0.0, 2.0])))
