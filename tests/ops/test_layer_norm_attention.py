"""LayerNorm, QKV and attention as one operator: one kernel for 16 bits at narrow widths, two launches elsewhere."""

import pytest
import torch
from torch import Tensor

from deit_fast import ops
from deit_fast.kernels import layer_norm_attention as kernels
from deit_fast.ops import backend
from tests.support.compare import (
    BATCHES,
    DTYPES,
    TOKENS,
    assert_gradients_are_right,
    assert_op_is_right,
    randn,
    strided,
)

EPS = 1e-6
HALVES = (torch.float16, torch.bfloat16)
in_16_bits = pytest.mark.parametrize("dtype", HALVES)


def arguments(
    batch: int, tokens: int, width: int, heads: int, dtype: torch.dtype, stream: torch.dtype | None = None
) -> list:
    """x, LayerNorm's weight, bias and eps, the packed projections' weight and bias, heads, scale."""
    stream = stream or dtype
    x, norm_bias, bias = (randn(*shape, dtype=stream) for shape in ((batch, tokens, width), (width,), (3 * width,)))
    weight = randn(3 * width, width, dtype=dtype, scale=width**-0.5)
    norm_weight = 1 + 0.3 * randn(width, dtype=stream)
    return [x, norm_weight, 0.3 * norm_bias, EPS, weight, 0.5 * bias, heads, (width // heads) ** -0.5]


def separate(x, norm_weight, norm_bias, eps, weight, bias, heads, scale) -> list:
    """The same as `layer_norm_attention_qkv` takes it."""
    weights, biases = weight.chunk(3), (None,) * 3 if bias is None else bias.chunk(3)
    projections = [t for pair in zip(weights, biases, strict=True) for t in pair]
    return [x, norm_weight, norm_bias, eps, *projections, heads, scale]


@pytest.fixture
def launches(monkeypatch) -> list[int]:
    """One entry for each launch of the one kernel: its programs."""
    seen = []
    run = kernels.launch.run

    def counted(kernel, programs, *rest, **options):
        if kernel is kernels.layer_norm_attention_kernel:
            seen.append(programs)
        return run(kernel, programs, *rest, **options)

    monkeypatch.setattr(kernels.launch, "run", counted)
    return seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_any_number_of_tokens(tokens, dtype, launches):
    assert_op_is_right("layer_norm_attention", *arguments(1, tokens, 64, 1, dtype))
    assert launches == [1] * (dtype in HALVES and tokens <= 256)


@in_16_bits
@pytest.mark.parametrize(("width", "heads"), [(64, 2), (128, 2), (192, 3), (384, 6)])
def test_every_narrow_width_and_both_head_widths(width, heads, dtype, launches):
    assert_op_is_right("layer_norm_attention", *arguments(1, 20, width, heads, dtype))
    assert launches == [heads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "heads"), [(96, 3), (80, 1), (448, 7)])
def test_other_widths_take_two_launches(width, heads, dtype, launches):
    assert_op_is_right("layer_norm_attention", *arguments(1, 20, width, heads, dtype))
    assert not launches


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_any_batch_in_both_layouts(batch, dtype):
    given = arguments(batch, 70, 128, 2, dtype)
    assert_op_is_right("layer_norm_attention", *given)
    assert_op_is_right("layer_norm_attention_qkv", *separate(*given))


@in_16_bits
def test_absent_parameters(dtype):
    x, norm_weight, _, eps, weight, bias, *rest = arguments(2, 20, 64, 1, dtype)
    assert_op_is_right("layer_norm_attention", x, None, None, eps, weight, None, *rest)
    given = separate(x, norm_weight, None, eps, weight, bias, *rest)
    given[7] = None  # BEiT-like models leave out the key's bias
    assert_op_is_right("layer_norm_attention_qkv", *given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(dtype):
    x, norm_weight, norm_bias, eps, weight, bias, *rest = arguments(2, 70, 64, 1, dtype)
    norm = (strided(norm_weight), strided(norm_bias), eps)
    assert_op_is_right("layer_norm_attention", strided(x), *norm, strided(weight), strided(bias), *rest)
    tokens_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_op_is_right("layer_norm_attention", tokens_first, *norm, weight, bias, *rest)
    given = separate(x[:1].expand(2, 70, 64), *norm, weight, bias, *rest)
    given[6] = strided(given[6])
    assert_op_is_right("layer_norm_attention_qkv", *given)


@in_16_bits
def test_a_float32_stream_beside_16_bit_weights_takes_two_launches(dtype, launches):
    """As autocast hands them over."""
    given = arguments(2, 70, 64, 1, dtype, stream=torch.float32)
    with torch.autocast("cpu", dtype):
        assert_op_is_right("layer_norm_attention", *given)
        assert_op_is_right("layer_norm_attention_qkv", *separate(*given))
    assert not launches


@in_16_bits
def test_autocast_casts_the_weights(dtype):
    given = arguments(2, 20, 64, 1, torch.float32)
    with backend.forced("triton"), torch.autocast("cpu", dtype):
        for out in (ops.layer_norm_attention(*given), ops.layer_norm_attention_qkv(*separate(*given))):
            assert out.dtype is dtype


@in_16_bits
def test_nan_and_infinity_go_where_float64_has_them(dtype):
    given = arguments(3, 70, 64, 1, dtype)
    given[0][0, 3, 5] = torch.nan
    given[0][1, 69, 5] = torch.inf
    out = assert_op_is_right("layer_norm_attention", *given)[0]
    assert out[:2].isnan().all()
    assert not out[2].isnan().any()


def test_values_of_rows_past_the_last_token_stay_out_even_where_they_overflow():
    """Such a row would be the norm's bias times the weight: here beyond float16, where no token's value is."""
    *_, eps, weight, _, heads, scale = arguments(1, 5, 64, 1, torch.float16)
    first_half = torch.arange(64) < 32
    x = torch.where(first_half, -1.0, 1.0).half().repeat(1, 5, 1)
    norm = torch.full((64,), 300.0).half()  # 300 x̂ + 300: 0 in the first half
    weight[128:] = torch.where(first_half, 8.0, 0.0)
    out = assert_op_is_right("layer_norm_attention", x, norm, norm, eps, weight, None, heads, scale)[0]
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_gradients(chosen, dtype):
    given = arguments(2, 20, 64, 1, dtype)
    assert_gradients_are_right("layer_norm_attention", *given, chosen=chosen)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("wanted", [0, 2, 4, 5])
def test_only_the_gradients_asked_for(wanted, chosen):
    given = arguments(2, 20, 64, 1, torch.float32)
    assert_gradients_are_right("layer_norm_attention", *given, chosen=chosen, wrt=(wanted,))


def test_a_head_width_without_a_kernel_uses_the_stock_operator_and_says_so():
    given = arguments(1, 9, 48, 2, torch.float32)
    with backend.forced("triton"), pytest.warns(UserWarning, match="no kernel for heads of width 24"):
        out = ops.layer_norm_attention(*given)
    with backend.forced("torch"):
        assert torch.equal(out, ops.layer_norm_attention(*given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "a width of 8 does not divide into 3 heads"),
        ({"weight": torch.zeros(16, 8)}, "weight must be that of q, k and v"),
        ({"x": torch.zeros(5, 8)}, r"must be a token sequence \[batch, tokens, width\], got \(5, 8\)"),
    ],
)
def test_bad_arguments_are_one_clear_error(change, message):
    given: dict[str, Tensor | int] = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(24, 8), "heads": 2} | change
    with pytest.raises(ValueError, match=message):
        ops.layer_norm_attention(given["x"], None, None, EPS, given["weight"], None, given["heads"], 1.0)
