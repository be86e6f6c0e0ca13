import pytest
import torch
from torch.nn import functional as F

from reference import attention, attention_qkv


@pytest.mark.parametrize("tokens", [1, 2, 17, 197])
def test_attention_is_torchs_softmax(tokens):
    qkv = torch.randn(2, tokens, 3, 4, 16, dtype=torch.float64)
    scale = 0.3
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, log_sum_exp = attention(qkv, scale)
    expected = F.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(out, expected.transpose(1, 2).reshape(2, tokens, 64))
    torch.testing.assert_close(log_sum_exp, torch.logsumexp(scale * q @ k.mT, dim=-1))


def test_packed_and_separate_attention_agree_on_strided_inputs():
    q, k, v = (torch.randn(2, 4, 9, 16, dtype=torch.float64).transpose(1, 2) for _ in range(3))
    packed = attention(torch.stack((q, k, v), dim=2), 0.25)
    for a, b in zip(packed, attention_qkv(q, k, v, 0.25), strict=True):
        torch.testing.assert_close(a, b)


def test_large_scores_do_not_overflow():
    qkv = torch.full((1, 3, 3, 1, 16), 100.0, dtype=torch.float64)
    out, log_sum_exp = attention(qkv, 1.0)
    torch.testing.assert_close(out, torch.full_like(out, 100.0))
    torch.testing.assert_close(log_sum_exp, torch.full_like(log_sum_exp, 160000.0) + torch.tensor(3.0).double().log())
