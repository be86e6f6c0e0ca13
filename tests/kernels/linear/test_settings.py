import pytest
import torch
from triton import cdiv

from deit_fast.kernels import linear
from deit_fast.kernels.launching.hardware import KNOWN
from deit_fast.kernels.launching.settings import Tile
from deit_fast.kernels.linear import settings

ROWS = 256 * 198


@pytest.mark.parametrize(
    ("programs", "slots", "splits"),
    # An H100's multiprocessors, one program each, and an A100's, two each.
    [(18, 132, 7), (6, 132, 22), (2, 132, 62), (72, 132, 5), (12, 216, 18), (36, 216, 6), (144, 216, 3), (108, 216, 2)],
)
def test_splits_fill_whole_waves(programs, slots, splits):
    assert settings.splits(programs, ROWS, slots, ROWS) == splits


@pytest.mark.parametrize(("rows", "most", "splits"), [(0, 9, 1), (100, 9, 1), (4096, 9, 8), (4096, 3, 3), (4096, 0, 1)])
def test_splits_of_few_rows(rows, most, splits):
    assert settings.splits(1, rows, 132, most) == splits


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((384, 1536), (128, 256)),
        ((1536, 384), (256, 128)),
        ((1152, 384), (256, 128)),
        ((384, 384), (128, 128)),
        ((768, 768), (128, 256)),
        ((64, 48), (64, 64)),
    ],
)
def test_a_weight_gradients_tile_pads_little(shape, tile):
    assert settings.weight_gradient(*shape, 2, "sm_90")[:2] == tile


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("arch", KNOWN)
@pytest.mark.parametrize("width", [192, 384, 768])
def test_the_fewer_the_rows_the_smaller_the_tiles(arch, width, itemsize):
    tiles = [settings.gemm(198 * batch, width, width, itemsize, arch, "residual") for batch in (1, 8, 64, 256)]
    assert [tile.rows * tile.columns for tile in tiles] == sorted(tile.rows * tile.columns for tile in tiles)
    programs = [cdiv(198 * n, t.rows) * cdiv(width, t.columns) for n, t in zip((1, 8, 64, 256), tiles, strict=True)]
    assert programs[0] >= 24 and min(programs[1:]) >= 128


def test_tables_are_asked_for_a_few_numbers_of_rows(monkeypatch):
    monkeypatch.setattr(settings, "interpreted", lambda: False)
    asked = [settings.rows_asked(tokens * batch) for tokens in (197, 198, 577, 578) for batch in range(1, 257)]
    assert sorted(set(asked)) == [256, 512, 1024, 2048, 4096, 8192, 16384]


@pytest.mark.parametrize("tile", [*settings._FEW_ROWS, Tile(128, 64, 32, 4, 4), Tile(128, 256, 64, 8, 3)])
@pytest.mark.parametrize("quarters", [False, True])
def test_every_tile_computes_the_same(tile, quarters, monkeypatch):
    """To the last bit but for the order of a row's sums, which the tile's depth decides."""
    x, weight, bias = torch.randn(3, 70, 96), torch.randn(200, 96) / 10, torch.randn(200)
    kept = torch.tensor([2, 0, 2, 1], dtype=torch.int32)
    residual, scale = torch.randn(3, 70, 96), torch.tensor([1.5, 0.0, 1.5])

    def found():
        hidden = linear.layer_norm_fc1(x, None, None, 1e-6, weight, bias, "gelu", kept, 2)
        y = linear.linear_residual(hidden[1], weight.T.contiguous(), None, residual, None, scale, kept)
        return (*hidden, y)

    shipped = found()
    monkeypatch.setattr(settings, "gemm", lambda *_: tile)
    monkeypatch.setattr(settings, "quarters", lambda *_: quarters)
    for mine, other in zip(found(), shipped, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


# By the name of a layer: outputs and inputs in units of the width, and what follows its product.
LAYERS = {"qkv": (3, 1, "none"), "projection": (1, 1, "residual"), "fc1": (4, 1, "gelu"), "fc2": (1, 4, "residual")}


def by_vendor(arch, width, product, tokens=16384, itemsize=2, projections=1, kept=False):
    """Layers whose product of this kind, in a block of this width, the shipped table gives to the vendor's GEMM."""

    def asked(n, k, fused):
        if product == "linear":
            return fused, tokens, n, k
        if product == "input_gradient":
            return "gelu" if k > n else "none", tokens, k, n
        return "none", n, k, tokens

    layers = {name: asked(n * width, k * width, fused) for name, (n, k, fused) in LAYERS.items()}
    return {
        name
        for name, shape in layers.items()
        if settings.vendor(product, *shape, itemsize, arch, projections, kept)
    }  # fmt: skip


ALL = set(LAYERS)


@pytest.mark.parametrize(
    ("arch", "width", "linear", "input_gradient", "weight_gradient"),
    [
        ("sm_90", 192, set(), set(), set()),
        ("sm_90", 384, set(), set(), set()),
        ("sm_90", 768, {"fc2"}, {"qkv", "fc1"}, ALL),
        ("sm_80", 192, set(), set(), set()),
        ("sm_80", 384, set(), set(), set()),
        ("sm_80", 768, {"fc2"}, {"qkv", "fc1"}, {"fc2", "projection"}),
        ("sm_89", 192, set(), {"qkv", "fc1"}, {"fc2"}),
        ("sm_89", 384, {"fc2"}, {"qkv", "projection", "fc1"}, ALL),
        ("sm_89", 768, {"qkv", "fc2"}, {"qkv", "projection", "fc1"}, ALL),
        ("sm_86", 768, set(), set(), set()),
        ("sm_100", 768, set(), set(), set()),
        ("gfx942", 768, set(), set(), set()),
    ],
)
def test_what_the_vendors_gemm_computes(arch, width, linear, input_gradient, weight_gradient):
    assert by_vendor(arch, width, "linear") == linear
    assert by_vendor(arch, width, "input_gradient") == input_gradient
    assert by_vendor(arch, width, "weight_gradient") == weight_gradient


@pytest.mark.parametrize("product", ["linear", "input_gradient", "weight_gradient"])
def test_nothing_by_the_vendors_gemm_where_no_estimate_is(product):
    for given in ({"tokens": 8192}, {"itemsize": 4}, {"kept": True}):
        assert by_vendor("sm_90", 768, product, **given) == set()
    assert bool(by_vendor("sm_90", 768, product, projections=3)) == (product == "weight_gradient")
