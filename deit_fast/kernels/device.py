"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def gelu(x, KIND: tl.constexpr):
    """GELU of float32 `x`: "gelu" is the exact one (erf), "gelu_tanh" its approximation (Hendrycks & Gimpel 2016)."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def gelu_derivative(x, KIND: tl.constexpr):
    if KIND == "gelu":
        # Φ(x) + x φ(x)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        slope = 1.5957691216057308 + 0.21406444881780076 * x * x
        double = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        sigmoid = tl.sigmoid(double)
        # Not 1 - sigmoid, which has no digits left where sigmoid is near 1.
        return sigmoid + x * sigmoid * tl.sigmoid(-double) * slope


@triton.jit
def row_statistics(x_rows, row_mask, eps, width, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """Mean and 1/std of the rows at pointers `x_rows` [ROWS, 1], in one pass of CHUNK columns a step.

    Chunks are merged by Chan's update, so that a large mean costs no digits (Chan, Golub & LeVeque 1983).
    Sums are of differences from the row's first element, so that a constant row has exactly its mean.
    """
    first = tl.load(x_rows, mask=row_mask[:, None], other=0.0).to(tl.float32)
    mean = tl.zeros([ROWS], dtype=tl.float32)
    squares = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        column_mask = (columns < width)[None, :]
        x = tl.load(x_rows + columns[None, :], mask=row_mask[:, None] & column_mask, other=0.0).to(tl.float32)
        x = tl.where(column_mask, x - first, 0.0)
        count = tl.minimum(width - start, CHUNK) * 1.0
        seen = start * 1.0
        chunk_mean = tl.sum(x, axis=1) / count
        deviation = tl.where(column_mask, x - chunk_mean[:, None], 0.0)
        shift = chunk_mean - mean
        squares += tl.sum(deviation * deviation, axis=1) + shift * shift * (seen * count / (seen + count))
        mean += shift * (count / (seen + count))
    return tl.sum(first, axis=1) + mean, 1.0 / tl.sqrt(squares / width + eps)


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
def online_softmax(scores, maximum, denominator, scale):
    """A tile of scores folded into the rows' running maximum and denominator (Milakov & Gimelshein 2018).

    Returns the tile's weights, by what factor earlier sums decay, and the new maximum and denominator.
    """
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    # A row that has seen only -inf keeps 0 as its reference, or -inf - -inf would make it NaN too early.
    reference = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    # The scale enters here, in the exponent's multiply-add; with log2(e), since the hardware has exp2.
    scale_log2 = scale * 1.4426950408889634
    weights = tl.exp2(scores * scale_log2 - (reference * scale_log2)[:, None])
    decay = tl.exp2((maximum - reference) * scale_log2)
    return weights, decay, new_maximum, denominator * decay + tl.sum(weights, axis=1)


@triton.jit
def sum_rows(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, drop_path_scale_ptr, kept_ptr, first, rows, count, tokens, column,
    column_mask, grad_stride, x_stride, ROW_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """Σ s grad and, with `x_ptr`, Σ s grad x̂ over `count` rows from `first` on, or as many as there are.

    s: drop path's scale of the row's sample. With `kept_ptr`, rows are those of kept samples, and grad is full.
    """
    # Element by element, so that threads meet once, at the end.
    total = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    projection = tl.zeros([ROW_BLOCK, COLUMN_BLOCK], dtype=tl.float32)
    # Nothing but loads: they are under way several steps ahead.
    for start in tl.range(0, tl.minimum(count, rows - first), ROW_BLOCK, num_stages=4):
        row = first + start + tl.arange(0, ROW_BLOCK)
        row_mask = row < rows
        mask = row_mask[:, None] & column_mask[None, :]
        offset = row.to(tl.int64)[:, None]
        grad_row = row
        if kept_ptr is not None:
            grad_row = full_row(kept_ptr, row, row_mask, tokens)
        grad_offset = grad_row.to(tl.int64)[:, None] * grad_stride
        grad = tl.load(grad_ptr + grad_offset + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if drop_path_scale_ptr is not None:
            scale = tl.load(drop_path_scale_ptr + grad_row // tokens, mask=row_mask, other=0.0)
            grad *= scale.to(tl.float32)[:, None]
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
def tile_of_program(tiles_m, tiles_n, GROUP: tl.constexpr):
    """The program's tile: GROUP row tiles take turns over all column tiles, so that both operands stay in L2."""
    pid = tl.program_id(0)
    group_size = GROUP * tiles_n
    first = (pid // group_size) * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    return first + (pid % group_size) % rows, (pid % group_size) // rows


@triton.jit
def normalised_rows(
    x_rows, row_mask, norm_weight_ptr, norm_bias_ptr, head, head_mask, tail, tail_mask, eps, DTYPE: tl.constexpr,
    WIDTH: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Whole rows after LayerNorm as two tiles of DTYPE, 0 where masked; the second is the first where TAIL is 0."""
    x_head = tl.load(x_rows + head[None, :], mask=row_mask[:, None] & head_mask[None, :], other=0.0).to(tl.float32)
    x_tail = x_head
    if TAIL > 0:
        x_tail = tl.load(x_rows + tail[None, :], mask=row_mask[:, None] & tail_mask[None, :], other=0.0).to(tl.float32)
    mean, rstd = tile_statistics(x_head, x_tail, head_mask, tail_mask, eps, WIDTH, TAIL)
    x_head = normalise(x_head, mean, rstd, norm_weight_ptr, norm_bias_ptr, head, head_mask)
    # Before the cast: what padding is normalised to may be past float16's largest.
    x_head = tl.where(head_mask[None, :], x_head, 0.0).to(DTYPE)
    if TAIL > 0:
        x_tail = normalise(x_tail, mean, rstd, norm_weight_ptr, norm_bias_ptr, tail, tail_mask)
        x_tail = tl.where(tail_mask[None, :], x_tail, 0.0).to(DTYPE)
    else:
        x_tail = x_head
    return x_head, x_tail


def approximation(activation: str) -> str:
    """What PyTorch's GELU calls `gelu`'s APPROXIMATION."""
    return "tanh" if activation == "gelu_tanh" else "none"
