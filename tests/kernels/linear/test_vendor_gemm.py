"""What the vendor's GEMM computes, tests/ops/test_linear.py compares, together with the kernels'."""

import pytest
import torch

from deit_fast.kernels import drop_path, linear
from deit_fast.kernels.linear import settings


def test_kept_samples_are_refused_for_tuning_to_leave_it_out(monkeypatch):
    monkeypatch.setattr(settings, "gemm", lambda *_: None)
    x, weight = torch.ones(2, 3, 8), torch.ones(8, 8)
    kept = drop_path.keep_samples(torch.ones(2))
    with pytest.raises(ValueError, match="does not know which samples are kept"):
        linear.layer_norm_linear(x, None, None, 1e-6, [weight], [None], kept, 2)
