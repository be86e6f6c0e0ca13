"""Operators that skip the samples drop path drops: what the same operators make of the kept samples alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deit_fast import ops
from deit_fast.ops import backend, drop_path
from tests.support.accuracy import assert_as_accurate_as_stock
from tests.support.compare import DTYPES
from tests.support.guard import Guard

EPS = 1e-6
BATCH, TOKENS, WIDTH, HEADS, HIDDEN = 4, 5, 64, 2, 96
SCALE = (WIDTH // HEADS) ** -0.5
PATTERNS = {"none": [], "one": [2], "some": [0, 1, 3], "all": [0, 1, 2, 3]}
# The stream, and what the products run in: where they differ, under autocast.
MIXTURES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
# Every pattern on the CPU and in one dtype of the kernels; in the others the one that says most.
CASES = [(None, mixture, pattern) for mixture in MIXTURES for pattern in PATTERNS]
CASES += [("triton", MIXTURES[0], pattern) for pattern in PATTERNS]
CASES += [("triton", mixture, "some") for mixture in MIXTURES[1:]]


def attention_half(x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias, gamma, *drop_path) -> Tensor:
    scale, kept, capacity = drop_path
    (packed,), x = ops.layer_norm_linear_branching(x, norm_weight, norm_bias, EPS, [qkv], [qkv_bias], kept, capacity)
    out, _ = ops.attention([packed.unflatten(-1, (3, HEADS, -1))], SCALE, kept)
    return ops.linear_residual(out, proj, proj_bias, x, gamma, scale, kept)


def mlp_half(x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, gamma, *drop_path) -> Tensor:
    scale, kept, capacity = drop_path
    hidden, x = ops.layer_norm_fc1_branching(x, norm_weight, norm_bias, EPS, fc1, fc1_bias, "gelu", kept, capacity)
    return ops.fc2_residual(*hidden, fc2, fc2_bias, x, gamma, scale, "gelu", kept)


def whole_mlp(x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, gamma, *drop_path) -> Tensor:
    scale, kept, _ = drop_path
    return ops.mlp(x, norm_weight, norm_bias, EPS, fc1, fc1_bias, fc2, fc2_bias, gamma, scale, "gelu", kept)


HIDDEN_WIDTHS = {attention_half: (3 * WIDTH, WIDTH), mlp_half: (HIDDEN, HIDDEN), whole_mlp: (HIDDEN, HIDDEN)}
halves = pytest.mark.parametrize("half", HIDDEN_WIDTHS, ids=lambda half: half.__name__)
backends = pytest.mark.parametrize("name", [None, "triton"], ids=["cpu", "kernels"])


def parameters(half, dtype: torch.dtype) -> list[Tensor]:
    wide, narrow = HIDDEN_WIDTHS[half]
    shapes = ((WIDTH,), (WIDTH,), (wide, WIDTH), (wide,), (WIDTH, narrow), (WIDTH,), (WIDTH,))
    return [(torch.randn(shape) / shape[-1] ** (0.5 * (len(shape) - 1))).to(dtype) for shape in shapes]


def drop_path_scale(pattern: list[int], dtype: torch.dtype) -> Tensor:
    scale = torch.zeros(BATCH, dtype=dtype)
    scale[pattern] = 1.25
    return scale


def differentiate(half, x: Tensor, params: list[Tensor], grad: Tensor, *drop_path) -> list[Tensor]:
    """The output, then the gradients of x and of every parameter."""
    inputs = [t.detach().requires_grad_() for t in (x, *params)]
    y = half(*inputs, *drop_path)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@halves
@pytest.mark.parametrize(
    ("name", "mixture", "pattern"),
    CASES,
    ids=lambda case: "-".join(str(d).removeprefix("torch.") for d in case) if isinstance(case, tuple) else case,
)
def test_kept_samples_are_as_alone_and_dropped_ones_pass_untouched(half, name, mixture, pattern) -> None:
    """Dropped samples and the room of packed tensors hold NaN: one read of them would show."""
    stream, dtype = mixture
    chosen = PATTERNS[pattern]
    dropped = [i for i in range(BATCH) if i not in chosen]
    params, scale = parameters(half, stream), drop_path_scale(chosen, stream)
    x, grad = (torch.randn(BATCH, TOKENS, WIDTH).to(stream) for _ in range(2))
    x[dropped] = grad[dropped] = torch.nan
    with backend.forced(name), torch.autocast("cpu", dtype, enabled=stream is not dtype):
        kept = ops.keep_samples(scale)
        y, dx, *rest = differentiate(half, x[chosen], params, grad[chosen], scale[chosen], None, None)
        for capacity in sorted({len(chosen), BATCH}):
            guard = Guard()
            with guard.outputs():
                found = differentiate(half, x, params, grad, scale, kept, capacity)
            guard.assert_untouched()
            assert same_bits(found[0][chosen], y) and same_bits(found[0][dropped], x[dropped])
            assert same_bits(found[1][chosen], dx)
            torch.testing.assert_close(found[1][dropped], grad[dropped], rtol=0, atol=0, equal_nan=True)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[2:], rest, strict=True))
            assert chosen or not any(g.any() for g in found[2:])


@halves
@pytest.mark.parametrize("pattern", PATTERNS)
def test_stock_operators_of_a_gpu_compute_all_the_room_and_no_dropped_sample_shows(half, pattern, monkeypatch) -> None:
    chosen, dtype = PATTERNS[pattern], torch.float64
    dropped = [i for i in range(BATCH) if i not in chosen]
    params, scale = parameters(half, dtype), drop_path_scale(chosen, dtype)
    x, grad = (torch.randn(BATCH, TOKENS, WIDTH).to(dtype) for _ in range(2))
    x[dropped] = torch.nan
    kept = ops.keep_samples(scale)
    with backend.forced("torch"):
        expected = differentiate(half, x, params, grad, scale, kept, BATCH)
        monkeypatch.setattr(drop_path, "_reads_count", lambda kept: False)
        for capacity in sorted({len(chosen), BATCH}):
            found = differentiate(half, x, params, grad, scale, kept, capacity)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, equal_nan=True)


def masked_attention(x, norm_weight, norm_bias, qkv, qkv_bias, proj, proj_bias, gamma, scale) -> Tensor:
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    q, k, v = F.linear(normalised, qkv, qkv_bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return x + F.linear(out, proj, proj_bias) * gamma * scale.view(-1, 1, 1)


def masked_mlp(x, norm_weight, norm_bias, fc1, fc1_bias, fc2, fc2_bias, gamma, scale) -> Tensor:
    normalised = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    return x + F.linear(F.gelu(F.linear(normalised, fc1, fc1_bias)), fc2, fc2_bias) * gamma * scale.view(-1, 1, 1)


@backends
@halves
@pytest.mark.parametrize("dtype", DTYPES)
def test_skipping_is_as_accurate_as_computing_and_masking(half, name, dtype) -> None:
    masked = masked_attention if half is attention_half else masked_mlp
    params, scale = parameters(half, dtype), drop_path_scale(PATTERNS["some"], dtype)
    x, grad = (torch.randn(BATCH, TOKENS, WIDTH).to(dtype) for _ in range(2))
    with backend.forced(name):
        ours = differentiate(half, x, params, grad, scale, ops.keep_samples(scale), BATCH)
    stock = differentiate(masked, x, params, grad, scale)
    exact = differentiate(masked, x.double(), [p.double() for p in params], grad.double(), scale.double())
    for i, results in enumerate(zip(ours, stock, exact, strict=True)):
        # The true gradient of the keys' bias is 0.
        if half is attention_half and i == 5:
            results = [torch.cat((r[:WIDTH], r[2 * WIDTH :])) for r in results]
        assert_as_accurate_as_stock(*results, dtype, name=f"result {i}")


# keep_samples -----------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_samples_come_first_and_both_parts_are_in_order(name, dtype) -> None:
    with backend.forced(name):
        kept = ops.keep_samples(torch.tensor([0, 1.25, 0, 0, 1e-4, 1.25], dtype=dtype))
        assert kept.dtype is torch.int32 and kept.tolist() == [3, 1, 4, 5, 0, 2, 3]
        assert ops.keep_samples(torch.zeros(2, dtype=dtype)).tolist() == [0, 0, 1]
        assert ops.keep_samples(torch.zeros(0, dtype=dtype)).tolist() == [0]


def test_the_operators_pass_opcheck_with_kept_samples() -> None:
    scale = torch.tensor([1.25, 0.0])
    kept = ops.keep_samples(scale)
    x, v = torch.randn(2, 5, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    w = torch.randn(32, 32, requires_grad=True)
    packed = torch.randn(1, 5, 32, requires_grad=True)
    library = torch.ops.deit_fast
    torch.library.opcheck(library.keep_samples.default, (scale,))
    torch.library.opcheck(library.layer_norm_linear.default, (x, v, v, EPS, [w], [v], kept, 1, "none"))
    with backend.forced("torch"):  # on a CPU of their own accord, both outputs have gradients
        torch.library.opcheck(library.layer_norm_fc1.default, (x, v, v, EPS, w, v, "gelu", kept, 1))
    torch.library.opcheck(library.linear_residual.default, (packed, w, v, x, v, scale, kept))
    activated = F.gelu(packed).detach()
    torch.library.opcheck(library.fc2_residual.default, (packed, activated, w, v, x, v, scale, "gelu", kept))
    torch.library.opcheck(library.attention.default, ([torch.randn(1, 5, 3, 1, 32, requires_grad=True)], 0.2, kept))
    torch.library.opcheck(library.mlp.default, (x, v, v, EPS, w, v, w, v, v, scale, "gelu", kept))


# Arguments that do not fit ----------------------------------------------------------------------------------------

X, W = torch.zeros(4, 5, 32), torch.zeros(32, 32)
CALLS = {
    "layer_norm_linear": lambda kept: ops.layer_norm_linear(X, None, None, EPS, [W], [None], kept, 4),
    "layer_norm_fc1": lambda kept: ops.layer_norm_fc1(X, None, None, EPS, W, None, "gelu", kept, 4),
    "linear_residual": lambda kept: ops.linear_residual(X, W, None, X, kept=kept),
    "fc2_residual": lambda kept: ops.fc2_residual(X, X, W, None, X, kept=kept),
    "attention": lambda kept: ops.attention([X.view(4, 5, 1, 1, 32).expand(4, 5, 3, 1, 32)], 1.0, kept),
    "mlp": lambda kept: ops.mlp(X, None, None, EPS, W, None, W, None, kept=kept),
}


@backends
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize(
    "kept",
    [torch.tensor([4, 0, 1, 2, 3]), torch.tensor([3, 0, 1, 2], dtype=torch.int32), torch.zeros(5, 1).int()],
    ids=["int64", "for another batch", "two dimensions"],
)
def test_a_kept_that_does_not_fit_is_one_clear_error(op, kept, name) -> None:
    with backend.forced(name), pytest.raises(ValueError, match=rf"deit_fast\.{op}: kept must be int32 of shape"):
        CALLS[op](kept)


@pytest.mark.parametrize("op", CALLS)
def test_a_kept_on_another_device_is_one_clear_error(op) -> None:
    kept = torch.zeros(5, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=rf"deit_fast\.{op}: kept is on meta, the input on cpu"):
        CALLS[op](kept)


@backends
@pytest.mark.parametrize("capacity", [-1, 5])
def test_a_capacity_beyond_the_batch_is_one_clear_error(capacity, name) -> None:
    kept = ops.keep_samples(torch.ones(4))
    with backend.forced(name), pytest.raises(ValueError, match=rf"capacity must be from 0 to .* 4, got {capacity}"):
        ops.layer_norm_linear(X, None, None, EPS, [W], [None], kept, capacity)


@backends
def test_the_capacity_need_not_be_given(name) -> None:
    with backend.forced(name):
        kept = ops.keep_samples(torch.tensor([0.0, 1.0, 1.0, 0.0]))
        assert ops.layer_norm_linear(X, None, None, EPS, [W], [None], kept)[0].shape[0] in (2, 4)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(2, 1), ValueError, r"drop_path_scale must have shape \(batch,\), got \(2, 1\)"),
        (torch.ones(2).int(), TypeError, "drop_path_scale must be a floating-point tensor, got torch.int32"),
    ],
)
def test_a_bad_scale_is_one_clear_error(scale, error, message) -> None:
    with pytest.raises(error, match=f"deit_fast.keep_samples: {message}"):
        ops.keep_samples(scale)
