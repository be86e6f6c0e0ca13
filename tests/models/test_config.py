import pytest

from deit_fast.models import DeiTConfig

TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3}


def test_token_counts_follow_the_tokens_and_the_positions_convention():
    plain, distilled = DeiTConfig(**TINY), DeiTConfig(**TINY, distilled=True)
    deit3 = DeiTConfig(**TINY, no_embed_class=True)
    assert [c.num_prefix_tokens for c in (plain, distilled, deit3)] == [1, 2, 1]
    assert [c.num_prefix_positions for c in (plain, distilled, deit3)] == [1, 2, 0]
    assert plain.grid_size == (14, 14) and plain.num_patches == 196


def test_images_may_have_any_shape_of_whole_patches():
    wide = DeiTConfig(**TINY, img_size=(64, 96), in_chans=1)
    assert (wide.input_size, wide.grid_size, wide.num_patches) == ((1, 64, 96), (4, 6), 24)
    assert DeiTConfig(**TINY, img_size=[64, 96], in_chans=1) == wide  # as JSON has it
    assert DeiTConfig(**TINY, img_size=(64, 64)).img_size == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": 230}, "multiple of the patch size 16, got 230; the nearest are 224 and 240"),
        ({"img_size": 8}, "the nearest are 16$"),
        ({"img_size": (224, 230)}, "multiple of the patch size 16, got 230; the nearest are 224 and 240"),
        ({"img_size": 0}, r"img_size must be a positive integer, or two of them \(height, width\), got 0"),
        ({"img_size": (224, 0)}, r"img_size must be a positive integer, or two .*, got \(224, 0\)"),
        ({"img_size": (224,)}, r"img_size must be a positive integer, or two .*, got \(224,\)"),
        ({"img_size": "224"}, "img_size must be a positive integer, or two .*, got '224'"),
        ({"num_heads": 5}, "embed_dim must be a multiple of num_heads, got 192 and 5"),
        ({"num_classes": -1}, "num_classes must be an integer and at least 0, got -1"),
        ({"depth": True}, "depth must be a positive integer"),
    ],
)
def test_a_bad_value_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        DeiTConfig(**(TINY | change))
