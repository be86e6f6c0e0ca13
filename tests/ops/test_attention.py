import pytest
import torch

from deit_fast import ops
from deit_fast.ops import backend
from tests.support.compare import BATCHES, DTYPES, TOKENS, assert_op_is_right, randn, strided

HEAD_DIMS = (32, 64, 80, 96, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype):
    assert_op_is_right("attention", randn(1, tokens, 3, 1, 64, dtype=dtype), 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_width(head_dim, dtype):
    assert_op_is_right("attention", randn(2, 70, 3, 2, head_dim, dtype=dtype), head_dim**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("heads", [1, 3])
def test_any_batch_and_head_count(batch, heads, dtype):
    assert_op_is_right("attention", randn(batch, 19, 3, heads, 32, dtype=dtype), 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 198), (65, 3), (16, 64)])
def test_separate_inputs_of_different_lengths(queries, keys, dtype):
    q = randn(2, queries, 2, 64, dtype=dtype)
    k, v = randn(2, keys, 2, 64, dtype=dtype), randn(2, keys, 2, 64, dtype=dtype)
    assert_op_is_right("attention_qkv", q, k, v, 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    q, k, v = (randn(2, 37, 2, 64, dtype=dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert_op_is_right("attention_qkv", *heads_first, 0.125)
    assert_op_is_right("attention_qkv", strided(q), strided(k), strided(v), 0.125)
    assert_op_is_right("attention_qkv", q[:1].expand(2, 37, 2, 64), k[:, :1].expand(2, 37, 2, 64), v, 0.125)
    assert_op_is_right("attention", strided(randn(2, 19, 3, 2, 32, dtype=dtype)), 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(dtype):
    assert_op_is_right("attention", randn(1, 70, 3, 1, 64, dtype=dtype, scale=12.0), 0.125)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_go_where_float64_has_them(dtype):
    q, k, v = (randn(1, 70, 1, 32, dtype=dtype) for _ in range(3))
    q[0, 3] = torch.nan
    q[0, 66, 0, 2] = torch.inf
    v[0, 5, 0, 7] = torch.nan
    v[0, 69, 0, 9] = torch.inf
    out, _ = assert_op_is_right("attention_qkv", q, k, v, 0.2)
    assert not out[0, 0, :7].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [0, 1])
def test_a_block_of_keys_that_scores_minus_infinity_is_ignored(block, dtype):
    q = torch.ones(1, 4, 1, 32, dtype=dtype)
    k, v = randn(1, 70, 1, 32, dtype=dtype), randn(1, 70, 1, 32, dtype=dtype)
    k[0, 64 * block : 64 * block + 64, 0, 0] = -torch.inf
    out, _ = assert_op_is_right("attention_qkv", q, k, v, 0.2)
    assert not out.isnan().any()


def test_the_log_sum_exp_is_that_of_the_scaled_scores():
    qkv = torch.randn(2, 37, 3, 2, 64)
    with backend.forced("triton"):
        _, log_sum_exp = ops.attention([qkv], 0.125)
    q, k, _ = qkv.double().permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(log_sum_exp.double(), (q @ k.mT * 0.125).logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_a_head_width_without_a_kernel_uses_the_stock_operator_and_says_so():
    qkv = torch.randn(1, 9, 3, 2, 24)
    with backend.forced("triton"), pytest.warns(UserWarning, match="attention: no kernel for heads of width 24"):
        out, _ = ops.attention([qkv], 0.2)
    with backend.forced("torch"):
        assert torch.equal(out, ops.attention([qkv], 0.2)[0])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\[batch, tokens, 3, heads, head_dim\], got \(2, 9, 2, 2, 64\)"):
        ops.attention([torch.ones(2, 9, 2, 2, 64)], 1.0)
    q = torch.ones(2, 9, 2, 64)
    with pytest.raises(ValueError, match="k and v the same"):
        ops.attention([q, q, q[:, :4]], 1.0)
    with pytest.raises(TypeError, match="one dtype"):
        ops.attention([q, q.half(), q], 1.0)
