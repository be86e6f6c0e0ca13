"""How launchers see their tensors."""

import torch

from deit_fast.kernels.launching.layout import all_or_none


def test_a_missing_bias_is_zeros_and_all_have_the_dtype_of_the_widest():
    """As autocast gives them: float32 biases beside 16-bit weights."""
    weight = torch.zeros(4, 8, dtype=torch.float16)
    q, v = torch.ones(4), torch.ones(4, dtype=torch.float16)
    biases = all_or_none([q, None, v], weight)
    assert [bias.dtype for bias in biases] == [torch.float32] * 3
    assert torch.equal(biases[1], torch.zeros(4))


def test_no_bias_at_all_stays_none():
    assert all_or_none([None, None, None], torch.zeros(4, 8)) == (None, None, None)
