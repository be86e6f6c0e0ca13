import pytest
import torch

from deit_fast.kernels.drop_path import keep_samples
from deit_fast.kernels.linear.branch_gradient import branch_gradient
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import NAN_BYTE, Guard


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 17, 64), (3, 65, 50), (3, 64), (3, 2, 5, 96)])
def test_it_is_scaled_and_packed_and_rounded_once(shape, dtype):
    grad, scale = strided(randn(*shape, dtype=torch.float32)), torch.tensor([1.25, 0.0, 0.75])
    scaled = (grad.double() * scale.double().view(3, *[1] * (len(shape) - 1))).float().to(dtype)
    guard = Guard()
    with guard.outputs():
        full = branch_gradient(guard(grad), guard(scale), None, 3, dtype)
        packed = branch_gradient(guard(grad), guard(scale), guard(keep_samples(scale)), 3, dtype)
    guard.assert_untouched()
    assert torch.equal(full, scaled)
    assert torch.equal(packed[:2], scaled[[0, 2]])
    assert (packed[2].contiguous().view(torch.uint8) == NAN_BYTE).all(), "rows beyond the kept ones were written"


def test_nothing_is_launched_where_it_is_the_gradient_as_given():
    grad = torch.randn(2, 5, 8)
    assert branch_gradient(grad, None, None, 2, torch.float32) is grad


def test_no_rows():
    kept = keep_samples(torch.zeros(0))
    assert branch_gradient(torch.randn(0, 5, 8), torch.zeros(0), kept, 0, torch.float16).shape == (0, 5, 8)
