import pytest

from deit_fast.kernels import launch


@pytest.mark.parametrize(
    ("width", "cover"),
    [(192, (128, 64)), (384, (256, 128)), (768, (512, 256)), (1024, (1024, 0)), (1280, (1024, 256)), (80, (64, 16))],
)
def test_every_deit_width_is_covered_without_padding(width, cover):
    assert launch.cover(width) == cover


@pytest.mark.parametrize("width", range(1, 1300, 7))
def test_any_width_is_covered_by_powers_of_two(width):
    head, tail = launch.cover(width)
    assert head + tail >= width
    for part in (head, tail):
        assert part == 0 or (part >= 16 and part & (part - 1) == 0)


@pytest.mark.parametrize(("tokens", "limit"), [(197, 1.25), (198, 1.25), (577, 1.10), (578, 1.10)])
def test_attention_computes_few_scores_that_no_token_asked_for(tokens, limit):
    tile = launch.attention(64, 2, "sm_90")

    def covered(block):
        return tokens // block * block + launch.tail_block(tokens, block)

    assert covered(tile.queries) * covered(tile.keys) <= limit * tokens * tokens
