import pytest
import torch
from torch.nn import functional as F

from reference import add_layer_norm, layer_norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(0, 5, 64), (3, 7, 33), (4, 1)])
def test_layer_norm_is_torchs(shape, affine):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(2, shape[-1], dtype=torch.float64) if affine else (None, None)
    expected = F.layer_norm(x, shape[-1:], weight, bias, 1e-6)
    torch.testing.assert_close(layer_norm(x, weight, bias, 1e-6), expected, rtol=1e-12, atol=1e-12)


def test_add_layer_norm_returns_the_sum_and_its_norm():
    x, residual = torch.randn(2, 3, 5, 48, dtype=torch.float64)
    weight, bias = torch.randn(2, 48, dtype=torch.float64)
    total, y = add_layer_norm(x, residual, weight, bias, 1e-6)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, F.layer_norm(x + residual, (48,), weight, bias, 1e-6), rtol=1e-12, atol=1e-12)
