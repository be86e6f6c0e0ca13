import pytest
import torch

from deit_fast.kernels import drop_path, linear
from deit_fast.kernels.launching import hardware
from deit_fast.kernels.launching.settings import Tile
from deit_fast.kernels.launching.settings import settings as chosen
from deit_fast.kernels.linear import persistent, settings
from tests.support.compare import assert_op_is_right, randn
from tests.support.compiled import printed_by

EPS = 1e-6
DTYPES = (torch.float16, torch.bfloat16)


@pytest.fixture
def calls(monkeypatch):
    """Of persistent programs, which are chosen wherever they can be: as `deit-fast tune` may. Two multiprocessors."""
    seen = []
    launch = persistent.linear
    monkeypatch.setattr(settings, "persistent", lambda *_: True)
    monkeypatch.setattr(hardware, "multiprocessors", lambda tensor: 2)
    monkeypatch.setattr(persistent, "linear", lambda *arguments: (seen.append(arguments), launch(*arguments)))
    return seen


@pytest.fixture
def small_tile(monkeypatch):
    monkeypatch.setattr(settings, "persistent_gemm", lambda *_: Tile(16, 64, 32, 4, 3))


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 8, 8), (50, 200, 104), (64, 128, 64), (33, 72, 40)])
def test_any_number_of_tiles_whole_or_not(rows, columns, depth, dtype, calls):
    x, norm = randn(2, rows, depth, dtype=dtype), randn(depth, dtype=dtype)
    weight, bias = randn(columns, depth, dtype=dtype, scale=depth**-0.5), randn(columns, dtype=dtype)
    assert_op_is_right("linear", x, weight, bias, "none")
    assert_op_is_right("layer_norm_linear", x, norm, norm, EPS, weight, None, "gelu")
    residual, scale = randn(2, rows, columns, dtype=dtype), randn(2, dtype=dtype)
    assert_op_is_right("linear_residual", x, weight, bias, residual, bias, scale)
    assert len(calls) >= 3


@pytest.mark.usefixtures("small_tile")
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_goes_into_the_activation_and_what_comes_out(dtype, calls):
    x, weight, bias = randn(2, 19, 72, dtype=dtype), randn(136, 72, dtype=dtype, scale=0.1), randn(136, dtype=dtype)
    assert_op_is_right("layer_norm_fc1", x, None, None, EPS, weight, bias, "gelu")
    assert calls


@pytest.mark.usefixtures("small_tile")
def test_rows_further_apart_than_they_are_long(calls):
    x, weight = randn(40, 128, dtype=torch.bfloat16), randn(64, 96, dtype=torch.bfloat16, scale=0.1)
    assert_op_is_right("linear", x[:, 8:72], weight[:, 32:])
    assert calls


@pytest.mark.parametrize("shape", [(0, 5, 64), (3, 0, 64)])
def test_no_rows(shape, calls):
    weight = randn(16, 64, dtype=torch.bfloat16)
    assert linear.linear(torch.empty(shape, dtype=torch.bfloat16), weight, None, "none").shape == (*shape[:2], 16)
    assert not calls


def aligned(rows, columns, dtype=torch.bfloat16):
    return torch.zeros(rows, columns, dtype=dtype)


X, WEIGHT, KEPT = aligned(40, 64), aligned(32, 64), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_operands_that_have_tensor_descriptors(arch):
    assert persistent.takes(X, [WEIGHT], None, arch)
    assert persistent.takes(aligned(40, 72)[:, 8:], [WEIGHT], None, arch)


@pytest.mark.parametrize("arch", sorted({*hardware.KNOWN} - {"sm_90", "sm_100", "sm_120"}))
def test_no_descriptors_on_other_gpus(arch):
    assert not persistent.takes(X, [WEIGHT], None, arch)


@pytest.mark.parametrize(
    ("x", "weights", "kept"),
    [
        (torch.zeros(40 * 64 + 1, dtype=torch.bfloat16)[1:].view(40, 64), [WEIGHT], None),  # the address
        (aligned(40, 68)[:, :64], [WEIGHT], None),  # the stride
        (aligned(1, 64).expand(40, 64), [WEIGHT], None),
        (aligned(40, 100), [aligned(32, 100)], None),
        (aligned(40, 0), [aligned(32, 0)], None),
        (X.float(), [WEIGHT], None),
        (X.float(), [WEIGHT.float()], None),
        (X, [WEIGHT] * 3, None),
        (X, [WEIGHT], KEPT),
    ],
)
def test_operands_that_have_none(x, weights, kept):
    assert not persistent.takes(x, weights, kept, "sm_90")


def test_operands_without_descriptors_take_the_plain_loop(calls):
    x = torch.randn(40 * 64 + 1).bfloat16()[1:].view(40, 64)
    weight = randn(32, 64, dtype=torch.bfloat16, scale=0.1)
    assert_op_is_right("linear", x, weight)
    kept = drop_path.keep_samples(torch.tensor([1.0, 0.0]))
    linear.layer_norm_linear(randn(2, 8, 64, dtype=torch.bfloat16), None, None, EPS, [weight], [None], kept)
    assert not calls


def test_no_shipped_setting_has_it():
    for arch in hardware.TENSOR_DESCRIPTORS:
        for fused in ("none", "gelu", "activated", "residual"):
            for width in (192, 384, 768):
                assert settings.persistent(16384, width, width, 2, arch, fused) is False


def test_a_tuned_choice_is_heeded():
    x, weight = randn(40, 64, dtype=torch.bfloat16), randn(32, 64, dtype=torch.bfloat16)
    asked = f"({settings.rows_asked(40)}, 32, 64, 2, sm_90, none)"
    tile = Tile(32, 32, 32, 4, 2)
    with chosen({f"persistent{asked}": True, f"persistent_gemm{asked}": tile._asdict()}) as answered:
        linear.linear(x, weight, None, "none")
    assert answered[f"persistent{asked}"] is True and answered[f"persistent_gemm{asked}"] == tile
    assert f"gemm{asked}" not in answered


@pytest.mark.parametrize("value", ["yes", 1, None, {"rows": 1}])
def test_a_choice_that_is_neither_yes_nor_no_is_refused(value):
    with chosen({"persistent(128, 64, 64, 2, sm_90, none)": value}), pytest.raises(ValueError, match="the table has"):
        settings.persistent(128, 64, 64, 2, "sm_90", "none")


@pytest.fixture(scope="module")
def compiled():
    return printed_by("-m", "tests.kernels.linear.persistent_checks")


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_it_compiles_without_spills(arch, compiled):
    found = [each for each in compiled["launches"] if each["target"] == arch]
    assert len(found) >= 10
    assert not [each for each in found if each["kernel"] != "persistent_linear_kernel" or each["problem"]]


def test_what_triton_asks_for_a_launch_is_there_anew_and_again_and_the_programs_own_allocator_stays(compiled):
    assert compiled["scratch"] == {"anew": 1, "again": 1, "bytes": [16 * 256] * 2, "own allocator stays": True}
