"""What the sanitizer must find: a good kernel with one fault planted in it."""

import pytest
import torch
import triton
import triton.language as tl
from ttsem.sanitize import KernelFault

from tests.sanitize.cases import FLOAT32, Arguments, SanitizerCase
from tests.sanitize.check import check

ROWS = 16


@triton.jit
def partial_sums_kernel(
    x_ptr, partial_ptr, rows, width, row_stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, FAULT: tl.constexpr
):
    """One program sums ROWS rows of x into its own row of `partial`."""
    block = tl.program_id(0)
    row = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    row_mask = row < rows
    column_mask = column < width
    if FAULT == "off_by_one":
        row_mask = row <= rows
    if FAULT == "wrong_stride":
        row_stride = width
    mask = row_mask[:, None] & column_mask[None, :]
    total = tl.sum(tl.load(x_ptr + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0), axis=0)
    if FAULT == "shared_row":
        block = block // 2
    partial = partial_ptr + block * width + column
    if FAULT == "unwritten":
        total += tl.load(partial, mask=column_mask, other=0.0)
    if FAULT == "no_mask":
        tl.store(partial, total)
    else:
        tl.store(partial, total, mask=column_mask)


def run(fault: str, layout: str = "contiguous") -> None:
    """Four programs, the last with one row of sixteen; 50 columns of 64."""

    def column_sums(t: Arguments) -> torch.Tensor:
        x = t.data(torch.randn(3 * ROWS + 1, t.width, generator=t.generator))
        if t.exact:
            return x.sum(0)
        partial = torch.empty(4, t.width)
        partial_sums_kernel[(4,)](x, partial, len(x), t.width, x.stride(0), ROWS=ROWS, BLOCK=64, FAULT=fault)
        return partial.sum(0)

    check(SanitizerCase(column_sums, FLOAT32, False, layout, 1, 1, 50, None, 90))


@pytest.mark.parametrize("layout", ("contiguous", "misaligned", "strided"))
def test_the_good_kernel_passes(layout):
    run("none", layout)


def test_off_by_one_mask_is_a_read_past_the_end():
    with pytest.raises(KernelFault, match=r"tl\.load.* reads 50 element\(s\) past the end .* `x_ptr`"):
        run("off_by_one")


def test_missing_mask_is_a_write_past_the_end():
    with pytest.raises(KernelFault, match=r"tl\.store.* writes 14 element\(s\) past the end .* `partial_ptr`"):
        run("no_mask")


def test_two_programs_writing_one_row_race():
    with pytest.raises(KernelFault, match=r"program instances .* both touch element 0 of `partial_ptr`"):
        run("shared_row")


def test_a_read_of_what_nobody_wrote_is_nan():
    with pytest.raises(AssertionError, match="nan"):
        run("unwritten")


def test_a_read_between_strided_rows_is_nan():
    """It stays within the storage, so out of no bounds."""
    with pytest.raises(AssertionError, match="nan"):
        run("wrong_stride", "strided")
