"""Guard bands see every store they should, and are invisible to a kernel that behaves."""

import pytest
import torch
import triton
import triton.language as tl

from tests.support.guard import Guard


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, 2 * tl.load(x_ptr + offsets), mask=offsets < n)


def double(x: torch.Tensor, claimed: int | None = None) -> torch.Tensor:
    y = torch.empty_like(x)
    double_kernel[(1,)](x, y, claimed or x.numel(), 64)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.t(),
        lambda x: x[1:, ::2],
        lambda x: x[:, :1].expand(6, 5),
        lambda x: x[:0],
        lambda x: x[0, 0],
        lambda x: x[0, 1:],
    ],
    ids=["contiguous", "transposed", "strided", "expanded", "empty", "scalar", "misaligned"],
)
def test_a_guarded_tensor_is_the_same_tensor(view, dtype):
    x = view(torch.randint(0, 2, (6, 8)).to(dtype))
    guard = Guard()
    inside = guard(x)
    assert torch.equal(inside, x)
    assert (inside.shape, inside.stride(), inside.dtype) == (x.shape, x.stride(), x.dtype)
    assert inside.data_ptr() % 16 == x.data_ptr() % 16
    guard.assert_untouched()


def test_a_guarded_parameter_stays_a_leaf_that_takes_gradients():
    guard = Guard()
    inside = guard(torch.randn(3, requires_grad=True))
    (inside * 2).sum().backward()
    assert torch.equal(inside.grad, torch.full((3,), 2.0))


def test_a_kernel_that_behaves_passes():
    guard = Guard()
    x = guard(torch.randn(5, 10))
    with guard.outputs():
        y = double(x)
    assert torch.equal(y, 2 * x)
    assert guard.output_count == 1
    guard.assert_untouched()


@pytest.mark.parametrize("allocate", ["empty", "empty_strided", "new_empty"])
def test_every_way_to_allocate_an_output_is_guarded(allocate):
    guard = Guard()
    with guard.outputs():
        y = {
            "empty": lambda: torch.empty(4, 3),
            "empty_strided": lambda: torch.empty_strided((4, 3), (1, 4)),
            "new_empty": lambda: torch.zeros(1).new_empty(4, 3),
        }[allocate]()
    assert y.isnan().all()
    assert guard.output_count == 1
    torch.as_strided(y, (1,), (1,), y.storage_offset() + 12).zero_()
    with pytest.raises(AssertionError, match="outside output"):
        guard.assert_untouched()


def test_a_store_past_the_output_is_seen():
    guard = Guard()
    x = guard(torch.randn(50))
    with guard.outputs():
        double(x, claimed=51)
    with pytest.raises(AssertionError, match=r"outside output \(50,\).*4 bytes, first at byte 200"):
        guard.assert_untouched()


def test_a_store_between_the_rows_of_a_strided_input_is_seen():
    guard = Guard()
    x = guard(torch.randn(4, 8)[:, :6], name="residual")
    torch.as_strided(x, (4, 8), (8, 1))[1, 7] = 0
    with pytest.raises(AssertionError, match="outside residual"):
        guard.assert_untouched()


def test_a_store_into_an_input_is_seen():
    guard = Guard()
    x = guard(torch.randn(4, 8), name="x")
    x[2, 2] += 1
    with pytest.raises(AssertionError, match="inside x"):
        guard.assert_untouched()


def test_a_load_past_the_input_reaches_the_result_as_nan():
    guard = Guard()
    x = guard(torch.randn(50))
    y = torch.empty(64)
    double_kernel[(1,)](x, y, 64, 64)
    assert y[:50].isfinite().all()
    assert y[50:].isnan().all()
