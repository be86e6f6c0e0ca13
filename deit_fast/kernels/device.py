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


def approximation(activation: str) -> str:
    """What PyTorch's GELU calls `gelu`'s APPROXIMATION."""
    return "tanh" if activation == "gelu_tanh" else "none"
