import pytest

from deit_fast.kernels.attention import settings
from deit_fast.kernels.launching import tiles

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1200")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("tokens", "limit"), [(197, 1.25), (198, 1.25), (577, 1.10), (578, 1.10)])
def test_attention_computes_few_scores_that_no_token_asked_for(tokens, limit, head_dim, itemsize, arch):
    def with_tail(block):
        return tokens // block * block + tiles.tail_block(tokens, block)

    def whole_blocks(block):
        return -(-tokens // block) * block

    forward = settings.attention(head_dim, itemsize, arch)
    of_queries, of_keys = settings.attention_backward(head_dim, itemsize, arch)
    assert with_tail(forward.queries) * with_tail(forward.keys) <= limit * tokens * tokens
    # In backward a kernel's own rows have the tail; those it walks over are in small blocks.
    assert with_tail(of_queries.queries) * whole_blocks(of_queries.keys) <= limit * tokens * tokens
    assert whole_blocks(of_keys.queries) * with_tail(of_keys.keys) <= limit * tokens * tokens
