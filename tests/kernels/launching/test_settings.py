import pytest

from deit_fast.kernels.attention.settings import AttentionTile, attention_backward
from deit_fast.kernels.launching.settings import Tile, settings
from deit_fast.kernels.layer_norm.settings import layer_norm_rows
from deit_fast.kernels.linear.settings import gemm
from deit_fast.kernels.mlp import mlp_tile


def test_settings_answer_for_the_table_and_tell_what_was_asked():
    asked, arguments = "gemm(16384, 1152, 384, 2, sm_90, gelu)", (16384, 1152, 384, 2, "sm_90", "gelu")
    shipped, other = gemm(*arguments), Tile(64, 64, 32, 4, 2)
    of_proj = gemm(16384, 384, 384, 2, "sm_90", "residual")
    for given in (other, other._asdict()):
        with settings({asked: given}) as answered:
            assert gemm(*arguments) == other
            assert gemm(16384, 384, 384, 2, "sm_90", "residual") == of_proj
        assert answered[asked] == other and len(answered) == 2
    assert gemm(*arguments) == shipped


def test_settings_of_several_tiles_come_as_lists():
    tiles = [AttentionTile(16, 32, 4, 1)._asdict(), AttentionTile(32, 16, 4, 1)._asdict()]
    with settings({"attention_backward(64, 2, sm_90)": tiles, "layer_norm_rows(384, (2,), sm_90)": [2, 8]}):
        assert attention_backward(64, 2, "sm_90") == (
            AttentionTile(16, 32, 4, 1),
            AttentionTile(32, 16, 4, 1),
        )
        assert layer_norm_rows(384, (2,), "sm_90") == (2, 8)


@pytest.mark.parametrize(
    "given", [{"rows": 64}, [1, 2], {"queries": 1, "keys": 2, "num_warps": 4, "num_stages": 1}, True, 64]
)
def test_a_setting_with_other_fields_is_refused(given):
    with (
        settings({"mlp(192, sm_90)": given}),
        pytest.raises(ValueError, match=r"a setting has .*; the table has"),
    ):
        mlp_tile(192, "sm_90")


@pytest.mark.parametrize("value", ["64", 64.0, None, True, [64]])
def test_a_field_that_is_no_number_is_refused(value):
    tile = {**gemm(16384, 384, 384, 2, "sm_90", "none")._asdict(), "rows": value}
    with settings({"gemm(16384, 384, 384, 2, sm_90, none)": tile}), pytest.raises(ValueError, match="the table has"):
        gemm(16384, 384, 384, 2, "sm_90", "none")
