import pytest
import torch

from deit_fast.kernels.linear.scaled_weight import scaled_weight
from tests.support.compare import DTYPES, randn, strided
from tests.support.guard import Guard


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e-30])
def test_the_product_of_what_comes_back_is_the_scaled_weight(factor, dtype):
    weight, layer_scale = strided(randn(50, 96, dtype=dtype)), factor * randn(50, dtype=torch.float32)
    guard = Guard()
    with guard.outputs():
        scaled, largest = scaled_weight(guard(weight), guard(layer_scale))
    guard.assert_untouched()
    assert largest == layer_scale.abs().max()
    exact = weight.double() * layer_scale.double()[:, None]
    torch.testing.assert_close(scaled.double() * largest.double(), exact, rtol=0.01, atol=1e-6 * factor)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_zeros_infinities_and_nans_stay_what_they_are(value):
    weight, layer_scale = torch.ones(3, 2), torch.tensor([0.0, value, 2.0 if value else 0.0])
    scaled, largest = scaled_weight(weight, layer_scale)
    assert torch.equal((scaled * largest).nan_to_num(7.0), (weight * layer_scale[:, None]).nan_to_num(7.0))
