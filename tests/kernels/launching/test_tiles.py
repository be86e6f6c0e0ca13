import pytest

from deit_fast.kernels.launching import tiles


@pytest.mark.parametrize(
    ("width", "cover"),
    [(192, (128, 64)), (384, (256, 128)), (768, (512, 256)), (1024, (1024, 0)), (1280, (1024, 256)), (80, (64, 16))],
)
def test_every_deit_width_is_covered_without_padding(width, cover):
    assert tiles.cover(width) == cover


@pytest.mark.parametrize("width", range(1, 1300, 7))
def test_any_width_is_covered_by_powers_of_two(width):
    head, tail = tiles.cover(width)
    assert head + tail >= width
    for part in (head, tail):
        assert part == 0 or (part >= 16 and part & (part - 1) == 0)
