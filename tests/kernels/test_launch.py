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


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950", "gfx1200")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize(("tokens", "limit"), [(197, 1.25), (198, 1.25), (577, 1.10), (578, 1.10)])
def test_attention_computes_few_scores_that_no_token_asked_for(tokens, limit, head_dim, itemsize, arch):
    def with_tail(block):
        return tokens // block * block + launch.tail_block(tokens, block)

    def whole_blocks(block):
        return -(-tokens // block) * block

    forward = launch.attention(head_dim, itemsize, arch)
    of_queries, of_keys = launch.attention_backward(head_dim, itemsize, arch)
    assert with_tail(forward.queries) * with_tail(forward.keys) <= limit * tokens * tokens
    # In backward a kernel's own rows have the tail; those it walks over are in small blocks.
    assert with_tail(of_queries.queries) * whole_blocks(of_queries.keys) <= limit * tokens * tokens
    assert whole_blocks(of_keys.queries) * with_tail(of_keys.keys) <= limit * tokens * tokens


def test_settings_answer_for_the_table_and_tell_what_was_asked():
    asked = "gemm(1152, 384, 2, sm_90, layer_norm)"
    shipped, other = launch.gemm(1152, 384, 2, "sm_90", "layer_norm"), launch.Tile(64, 64, 32, 4, 2)
    for given in (other, other._asdict()):
        with launch.settings({asked: given}) as answered:
            assert launch.gemm(1152, 384, 2, "sm_90", "layer_norm") == other
            assert launch.gemm(384, 384, 2, "sm_90", "none") == launch.gemm.__wrapped__(384, 384, 2, "sm_90", "none")
        assert answered[asked] == other and len(answered) == 2
    assert launch.gemm(1152, 384, 2, "sm_90", "layer_norm") == shipped


def test_settings_of_several_tiles_come_as_lists():
    tiles = [launch.AttentionTile(16, 32, 4, 1)._asdict(), launch.AttentionTile(32, 16, 4, 1)._asdict()]
    with launch.settings({"attention_backward(64, 2, sm_90)": tiles, "layer_norm_rows(384, (2,), sm_90)": [2, 8]}):
        assert launch.attention_backward(64, 2, "sm_90") == (
            launch.AttentionTile(16, 32, 4, 1),
            launch.AttentionTile(32, 16, 4, 1),
        )
        assert launch.layer_norm_rows(384, (2,), "sm_90") == (2, 8)


@pytest.mark.parametrize("given", [{"rows": 64}, [1, 2], {"queries": 1, "keys": 2, "num_warps": 4, "num_stages": 1}])
def test_a_setting_with_other_fields_is_refused(given):
    with (
        launch.settings({"mlp(192, sm_90)": given}),
        pytest.raises(ValueError, match=r"a setting has .*; the table has"),
    ):
        launch.mlp(192, "sm_90")


def test_the_drivers_version_is_asked_of_the_driver(monkeypatch):
    """On a stand-in for libcuda, and where there is none."""

    class Library:
        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuDriverGetVersion(self, version) -> None:
            version._obj.value = 12080

    def missing(name: str):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(launch.torch.version, "hip", None)
    for library, version in ((Library, "12080"), (missing, "none")):
        monkeypatch.setattr(launch.ctypes, "CDLL", library)
        assert launch.driver_version.__wrapped__() == version
    monkeypatch.setattr(launch.torch.version, "hip", "6.4")
    assert launch.driver_version.__wrapped__() == "6.4"
