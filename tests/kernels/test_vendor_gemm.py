import pytest
import torch

from deit_fast.kernels import drop_path, launch, linear
from tests.support.compare import BATCHES, DTYPES, WIDTHS, assert_op_is_right, randn, strided

EPS = 1e-6


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """As `deit-fast tune` may choose."""
    monkeypatch.setattr(launch, "gemm", lambda *_: None)
    monkeypatch.setattr(launch, "layer_norm_linear_rows", lambda *_: None)


def weight_of(out_features, in_features, dtype):
    return randn(out_features, in_features, dtype=dtype, scale=in_features**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_product_at_any_width(width, dtype):
    x, norm, into = randn(2, 9, width, dtype=dtype), randn(width, dtype=dtype), weight_of(100, width, dtype)
    assert_op_is_right("linear", x, into, None, "none", "none")
    assert_op_is_right("layer_norm_linear", x, norm, norm, EPS, into, randn(100, dtype=dtype))
    narrow, bias = into[:64], randn(64, dtype=dtype)
    assert_op_is_right("layer_norm_qkv", x, norm, norm, EPS, narrow, bias, narrow.flip(0), None, -narrow, bias)
    back, h = weight_of(width, 100, dtype), randn(2, 9, 100, dtype=dtype)
    assert_op_is_right("linear_residual", h, back, norm, x, norm, randn(2, dtype=dtype), "gelu_tanh")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("input_activation", ["none", "gelu", "gelu_tanh"])
def test_activations_before_and_after(activation, input_activation, dtype):
    x = randn(2, 20, 64, dtype=dtype, scale=2.0)
    assert_op_is_right("linear", x, weight_of(48, 64, dtype), randn(48, dtype=dtype), activation, input_activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_layer_scale", [False, True])
@pytest.mark.parametrize("with_drop_path", [False, True])
def test_every_residual_epilogue(with_bias, with_layer_scale, with_drop_path, batch, dtype):
    x, weight, residual = randn(batch, 5, 64, dtype=dtype), weight_of(80, 64, dtype), randn(batch, 5, 80, dtype=dtype)
    bias = randn(80, dtype=dtype) if with_bias else None
    layer_scale = randn(80, dtype=dtype) if with_layer_scale else None
    drop_path_scale = torch.arange(batch).to(dtype) if with_drop_path else None
    arguments = (x, weight, bias, residual, layer_scale, drop_path_scale, "none")
    y = assert_op_is_right("linear_residual", *arguments)[0]
    if with_drop_path and batch:
        assert torch.equal(y[0], residual[0]), "a dropped sample passes its residual through"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_expanded_inputs(dtype):
    x, weight, vector = randn(3, 7, 50, dtype=dtype), weight_of(50, 50, dtype), strided(randn(50, dtype=dtype))
    for view in (strided(x), x[:1].expand(3, 7, 50), x.transpose(0, 1).contiguous().transpose(0, 1)):
        for matrix in (strided(weight), weight.T):
            assert_op_is_right("linear_residual", view, matrix, vector, strided(x), vector, None, "gelu")
            assert_op_is_right("layer_norm_linear", view, vector, vector, EPS, matrix, vector)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_autocast_hands_over(dtype):
    """Float32 stream, norm and biases, 16-bit weights."""
    x, vector = randn(2, 20, 96, dtype=torch.float32), randn(96, dtype=torch.float32)
    weight, h = weight_of(96, 96, dtype), randn(2, 20, 96, dtype=dtype)
    with torch.autocast("cpu", dtype):
        qkv = assert_op_is_right("layer_norm_linear", x, vector, vector, EPS, weight, vector)[0]
        stream = assert_op_is_right("linear_residual", h, weight, vector, x, vector, None, "gelu")[0]
    assert qkv.dtype is dtype and stream.dtype is torch.float32


def test_kept_samples_are_refused_for_tuning_to_leave_it_out():
    x, weight = torch.ones(2, 3, 8), torch.ones(8, 8)
    kept = drop_path.keep_samples(torch.ones(2))
    with pytest.raises(ValueError, match="does not know which samples are kept"):
        linear.layer_norm_linear(x, None, None, EPS, weight, None, kept, 2)
