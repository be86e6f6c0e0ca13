import pytest
import torch
from torch.nn import functional as F

from reference import activate


@pytest.mark.parametrize(
    ("name", "stock"),
    [("none", lambda x: x), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_activation_is_torchs(name, stock):
    x = torch.linspace(-9, 9, 501, dtype=torch.float64)
    torch.testing.assert_close(activate(x, name), stock(x), rtol=1e-12, atol=1e-15)
