import torch
from torch import nn

from deit_fast.check.saved_bytes import saved_bytes


def test_saved_bytes_are_distinct_activations_without_parameters():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16, bias=False))
    x = torch.randn(4, 8)
    activations = 4 * 8 + 4 * 16 + 4 * 16  # x, the pre-activation, GELU's output
    assert saved_bytes(model, lambda: model(x)) == 4 * activations
    twice = saved_bytes(model, lambda: model(x).sum() + model(x).sum())
    assert twice == 4 * (2 * activations - 4 * 8)
