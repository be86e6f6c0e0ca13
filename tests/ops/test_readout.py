"""Readout attention, operator by operator: values and gradients of the rows that are read."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import reference
from deit_fast import ops
from deit_fast.ops import backend
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES, randn, strided

EPS = 1e-6
NAMES = ("out", "rows", "x", "norm_weight", "norm_bias", "q", "q_bias", "k", "k_bias", "v", "v_bias")


def arguments(
    batch: int, tokens: int, width: int, dtype: torch.dtype, stream: torch.dtype | None = None
) -> list[Tensor]:
    """x, LayerNorm's weight and bias, then weight and bias of q, k and v."""
    stream = stream or dtype
    x, bias = randn(batch, tokens, width, dtype=stream), randn(width, dtype=stream)
    projections = [
        t for _ in range(3) for t in (randn(width, width, dtype=dtype) / width**0.5, 0.5 * randn(width, dtype=stream))
    ]
    return [x, 1 + 0.3 * randn(width, dtype=stream), 0.3 * bias, *projections]


def stock(heads: int, rows: int, x, norm_weight, norm_bias, q, q_bias, k, k_bias, v, v_bias) -> tuple[Tensor, Tensor]:
    """What a model's own modules compute, in the dtype of the weights."""
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS).to(q.dtype)
    q, k, v = (
        F.linear(normalised, weight, bias.to(weight.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
        for weight, bias in ((q, q_bias), (k, k_bias), (v, v_bias))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, :rows], x[:, :rows]


def exact(heads: int, rows: int, x, norm_weight, norm_bias, q, q_bias, k, k_bias, v, v_bias) -> tuple[Tensor, Tensor]:
    scale = (q.shape[0] // heads) ** -0.5
    out = reference.readout_attention(
        x, norm_weight, norm_bias, EPS, q, q_bias, k, v, v_bias, heads, scale, readout_rows=rows
    )
    return out, x[:, :rows]


def separate(heads: int, rows: int, x, norm_weight, norm_bias, *projections) -> tuple[Tensor, Tensor]:
    scale = (x.shape[-1] // heads) ** -0.5
    weights, biases = list(projections[::2]), list(projections[1::2])
    return ops.readout_attention(x, norm_weight, norm_bias, EPS, weights, biases, rows, heads, scale)


def packed(heads: int, rows: int, x, norm_weight, norm_bias, *projections) -> tuple[Tensor, Tensor]:
    scale = (x.shape[-1] // heads) ** -0.5
    weight, bias = torch.cat(projections[::2]), torch.cat(projections[1::2])
    return ops.readout_attention(x, norm_weight, norm_bias, EPS, [weight], [bias], rows, heads, scale)


def differentiate(function, heads: int, rows: int, inputs: list[Tensor], grads: tuple[Tensor, Tensor]) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = function(heads, rows, *inputs)
    found = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for g, t in zip(found, inputs, strict=True))]


def check(function, heads: int, rows: int, inputs: list[Tensor]) -> None:
    batch, tokens, width = inputs[0].shape
    grads = randn(batch, rows, width, dtype=inputs[3].dtype), randn(batch, rows, width, dtype=inputs[0].dtype)
    ours = differentiate(function, heads, rows, inputs, grads)
    stocks = differentiate(stock, heads, rows, inputs, grads)
    doubles = [t.double() for t in inputs]
    right = differentiate(exact, heads, rows, doubles, tuple(g.double() for g in grads))
    of_values = ours[NAMES.index("v")].double().norm()
    for name, a, b, c in zip(NAMES, ours, stocks, right, strict=True):
        if name == "k_bias":
            assert not a.any(), "its true gradient is 0"
        elif tokens == 1 and name in ("q", "q_bias", "k"):
            # The only token's weight is 1 whatever the query: their true gradient is 0 too, and what is left is noise:
            # of one rounding to the dtype, and of two float32 sums of 32 products, each with √32 half units, which
            # scale · |q| or |k| make some three times larger.
            noise = torch.finfo(a.dtype).eps + 16 * torch.finfo(torch.float32).eps
            assert a.double().norm() < noise * of_values
        else:
            assert_as_accurate_as_stock(a, b, c, a.dtype)
    again = differentiate(function, heads, rows, inputs, grads)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


def batch_of(tokens: int) -> int:
    """Of one token the noise in a score's gradient, one number a head, is most of x's error: enough for a sample."""
    return 24 if tokens == 1 else 2


in_every_dtype = pytest.mark.parametrize("dtype", DTYPES)
in_both_layouts = pytest.mark.parametrize("function", [separate, packed])


@in_both_layouts
@in_every_dtype
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (2, 2), (17, 2), (198, 2), (197, 1)])
def test_on_the_cpu_values_and_gradients_are_as_right_as_stocks(function, dtype, tokens, rows) -> None:
    check(function, 3, rows, arguments(batch_of(tokens), tokens, 96, dtype))


@in_every_dtype
@pytest.mark.parametrize(("tokens", "rows"), [(1, 1), (17, 2), (198, 2)])
def test_in_the_kernels_values_and_gradients_are_as_right_as_stocks(dtype, tokens, rows, triton_backend) -> None:
    check(packed, 2, rows, arguments(batch_of(tokens), tokens, 64, dtype))


@pytest.mark.parametrize("width", [50, 192])
def test_any_width_in_the_kernels(width, triton_backend) -> None:
    check(separate, 2, 2, arguments(2, 9, width, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [None, "triton"])
def test_a_float32_stream_and_16_bit_weights(dtype, name) -> None:
    """As autocast hands them over."""
    with backend.forced(name), torch.autocast("cpu", dtype):
        check(separate, 2, 2, arguments(2, 20, 64, dtype, stream=torch.float32))


def test_any_strides(triton_backend) -> None:
    x, *rest = arguments(2, 9, 64, torch.float32)
    check(separate, 2, 2, [strided(x), *rest])
    check(separate, 2, 2, [x[:1].expand(2, 9, 64), *rest])


@pytest.mark.parametrize("name", [None, "triton"])
def test_a_batch_of_no_images(name) -> None:
    with backend.forced(name):
        inputs = [t.requires_grad_() for t in arguments(0, 9, 64, torch.float32)]
        out, rows = packed(2, 2, *inputs)
        assert out.shape == rows.shape == (0, 2, 64)
        out.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in inputs)


@pytest.mark.parametrize("wanted", range(9))
@pytest.mark.parametrize("name", [None, "triton"])
def test_only_the_gradients_asked_for_are_computed_and_they_are_the_same(wanted, name) -> None:
    inputs = arguments(2, 9, 64, torch.float32)
    grads = randn(2, 2, 64, dtype=torch.float32), randn(2, 2, 64, dtype=torch.float32)
    with backend.forced(name):
        everything = differentiate(separate, 2, 2, inputs, grads)[2:]
        given = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        outputs = separate(2, 2, *given)
        used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in used], given[wanted], [g for _, g in used])[0]
    torch.testing.assert_close(found, everything[wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 6}, "readout_rows must be from 1 to the 5 tokens, got 6"),
        ({"rows": 0}, "readout_rows must be from 1 to the 5 tokens, got 0"),
        ({"heads": 3}, "a width of 8 does not divide into 3 heads"),
        ({"weight": torch.zeros(16, 8)}, "weight must be that of q, k and v"),
        ({"x": torch.zeros(5, 8)}, r"must be a token sequence \[batch, tokens, width\], got \(5, 8\)"),
    ],
)
def test_bad_arguments_are_one_clear_error(change, message) -> None:
    given = {"x": torch.zeros(2, 5, 8), "weight": torch.zeros(24, 8), "rows": 2, "heads": 2} | change
    with pytest.raises(ValueError, match=message):
        ops.readout_attention(
            given["x"], None, None, EPS, [given["weight"]], [None], given["rows"], given["heads"], 1.0
        )
