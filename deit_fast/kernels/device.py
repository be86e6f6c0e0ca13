"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def gelu(x, KIND: tl.constexpr, SHORT: tl.constexpr):
    """GELU of float32 `x`: "gelu" is the exact one (erf), "gelu_tanh" its approximation (Hendrycks & Gimpel 2016).

    SHORT, for a result of 16 bits, takes a third of erf's instructions and is right to half a unit in the last place,
    as `max(x, 0) - |x| Φ(-|x|)`. What erf's 1 + erf(x) loses to cancellation below zero is not lost there.
    """
    if KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif SHORT:
        z = tl.minimum(tl.abs(x), 5.6)
        # max(x, 0), but NaN of -inf, as stock's.
        half = 0.5 * x
        return (half + tl.abs(half)) - z * _normal_tail(z)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_and_derivative(x, KIND: tl.constexpr, SHORT: tl.constexpr):
    """`gelu(x)` and its derivative, Φ(x) + x φ(x) of the exact one, from what the two share."""
    if KIND == "gelu_tanh":
        slope = 1.5957691216057308 + 0.21406444881780076 * x * x
        double = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        sigmoid = tl.sigmoid(double)
        # Not 1 - sigmoid, which has no digits left where sigmoid is near 1.
        return x * sigmoid, sigmoid + x * sigmoid * tl.sigmoid(-double) * slope
    elif SHORT:
        z = tl.minimum(tl.abs(x), 5.6)
        tail = _normal_tail(z)
        half = 0.5 * x
        cdf = tl.where(x > 0, 1.0 - tail, tail)
        # φ(x), by exp2(-x² log2(e) / 2)
        density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
        return (half + tl.abs(half)) - z * tail, cdf + x * density
    else:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def _normal_tail(z):
    """Φ(-z), the normal distribution's tail, for z from 0 to 5.6: `2^-q(z)` with a polynomial for q(z) = -log2 Φ(-z).

    q(0) is 1, exactly. The other coefficients are the minimax fit of degree 6 to q, which makes it one to the relative
    error of Φ (by iteratively reweighted least squares); where z Φ(-z) is below 1e-7, past 5.1, errors count for less.
    """
    q = -2.6216346668661572e-05 * z + 0.0006630684365518391
    q = q * z - 0.007509433198720217
    q = q * z + 0.0520629808306694
    q = q * z + 0.4601430892944336
    q = q * z + 1.1507394313812256
    return tl.exp2(-q * z - 1.0)


@triton.jit
def tile_statistics(head, tail, head_mask, tail_mask, eps, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """Mean and 1/std of rows that lie on chip as two float32 tiles, 0 where masked; no `tail` where TAIL is 0."""
    total = tl.sum(head, axis=1)
    if TAIL > 0:
        total += tl.sum(tail, axis=1)
    mean = total / WIDTH
    # What rounding left in the mean: a constant row must come out as zeros, not as rounding errors over sqrt(eps).
    total = tl.sum(tl.where(head_mask[None, :], head - mean[:, None], 0.0), axis=1)
    if TAIL > 0:
        total += tl.sum(tl.where(tail_mask[None, :], tail - mean[:, None], 0.0), axis=1)
    mean += total / WIDTH
    deviation = tl.where(head_mask[None, :], head - mean[:, None], 0.0)
    squares = tl.sum(deviation * deviation, axis=1)
    if TAIL > 0:
        deviation = tl.where(tail_mask[None, :], tail - mean[:, None], 0.0)
        squares += tl.sum(deviation * deviation, axis=1)
    return mean, 1.0 / tl.sqrt(squares / WIDTH + eps)


@triton.jit
def sum_rows(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, first, rows, count, column, column_mask, grad_stride, x_stride,
    ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ grad and, with `x_ptr`, Σ grad x̂ over `count` rows from `first` on, or as many as there are."""
    # Element by element, so that threads meet once, at the end.
    total = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    projection = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    # Nothing but loads: they are under way several steps ahead.
    for start in tl.range(0, tl.minimum(count, rows - first), ROW_BLOCK, num_stages=4):
        row = first + start + tl.arange(0, ROW_BLOCK)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row.to(tl.int64)[:, None]
        grad = tl.load(grad_ptr + offset * grad_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += grad
        if x_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
            x = tl.load(x_ptr + offset * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
            projection += grad * ((x - mean[:, None]) * rstd[:, None])
    return tl.sum(total, axis=0), tl.sum(projection, axis=0)


@triton.jit
def normalise(x, mean, rstd, weight_ptr, bias_ptr, columns, mask):
    """`(x - mean) * rstd * weight + bias` for a float32 tile [ROWS, COLUMNS]; absent parameters are skipped."""
    x = (x - mean[:, None]) * rstd[:, None]
    if weight_ptr is not None:
        x *= tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def full_row(kept_ptr, row, row_mask, tokens):
    """The rows, of the full tensor, that kept samples' packed rows stand for; past those, the dropped samples' rows.

    kept: as `drop_path.keep_samples` returns it; `tokens` rows make a sample. Rows, unlike elements, are fewer than
    2^31, so these are int32: a division by `tokens` in 64 bits is long and takes many registers.
    """
    row = row.to(tl.int32)
    sample = row // tokens
    full_sample = tl.load(kept_ptr + 1 + sample, mask=row_mask, other=0)
    return full_sample * tokens + (row - sample * tokens)


@triton.jit
def copy_dropped(
    source_ptr, target_ptr, kept_ptr, first, last, tokens, column, column_mask, source_stride, target_stride
):
    """Copies the rows from `first` to `last`, in `full_row`'s order, of samples that drop path leaves as they are."""
    # A few rows a step: a whole tile would take more registers than the product that is its program's work.
    for start in range(first, last, 32):
        row = start + tl.arange(0, 32)
        row_mask = row < last
        row = full_row(kept_ptr, row, row_mask, tokens).to(tl.int64)[:, None]
        mask = row_mask[:, None] & column_mask[None, :]
        x = tl.load(source_ptr + row * source_stride + column[None, :], mask=mask, other=0.0)
        tl.store(target_ptr + row * target_stride + column[None, :], x.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_residual(
    branch, residual_ptrs, layer_scale_ptr, drop_path_scale_ptr, rows, columns, row_mask, column_mask, tokens
):
    """`residual + drop_path_scale * layer_scale * branch` for a float32 tile; `tokens` rows make a sample."""
    if layer_scale_ptr is not None:
        branch *= tl.load(layer_scale_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if drop_path_scale_ptr is not None:
        scale = tl.load(drop_path_scale_ptr + rows // tokens, mask=row_mask, other=0.0)
        branch *= scale.to(tl.float32)[:, None]
    mask = row_mask[:, None] & column_mask[None, :]
    return tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32) + branch


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a tile [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP: tl.constexpr):
    """The tile of a program that has one."""
    return nth_tile(tl.program_id(0), tiles_m, tiles_n, GROUP)


@triton.jit
def nth_tile(n, tiles_m, tiles_n, GROUP: tl.constexpr):
    """GROUP row tiles take turns over all column tiles, so that both operands stay in L2."""
    group_size = GROUP * tiles_n
    first = (n // group_size) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + (n % group_size) % rows, (n % group_size) // rows


def approximation(activation: str) -> str:
    """What PyTorch's GELU calls `gelu`'s APPROXIMATION."""
    return "tanh" if activation == "gelu_tanh" else "none"
