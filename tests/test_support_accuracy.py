"""The accuracy rule lets rounding pass and nothing else."""

from contextlib import nullcontext

import pytest
import torch

from tests.support.accuracy import assert_as_accurate_as_stock, searched, unit_in_last_place

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=DTYPES, ids=str)
def product(request):
    """(dtype, stock result, exact result) of a matrix product in that dtype."""
    a, b = torch.randn(64, 48).to(request.param), torch.randn(48, 32).to(request.param)
    return request.param, a @ b, a.double() @ b.double()


def test_correct_rounding_and_stock_itself_pass(product):
    dtype, stock, exact = product
    assert_as_accurate_as_stock(stock, stock, exact, dtype)
    assert_as_accurate_as_stock(exact.to(dtype), stock, exact, dtype)


def test_correct_rounding_passes_where_stock_is_exact(product):
    dtype, _, exact = product
    stock = exact.to(dtype)
    neighbour = torch.nextafter(stock, torch.full_like(stock, float("inf")))
    one_off = torch.where(torch.arange(32) == 0, neighbour, stock)
    assert_as_accurate_as_stock(one_off, stock, stock.double(), dtype)


def test_one_wrong_element_fails_with_its_place(product):
    dtype, stock, exact = product
    ours = stock.clone()
    ours[5, 7] += 16 * unit_in_last_place(exact.abs().max().item(), dtype)
    with pytest.raises(AssertionError, match=r"less accurate(.|\n)*worst at \(5, 7\)"):
        assert_as_accurate_as_stock(ours, stock, exact, dtype)


def test_a_searched_case_has_twice_the_room_and_no_more():
    exact = torch.linspace(1, 2, 64, dtype=torch.float64)
    stock = exact.float()
    for ulps, passes in ((0.75, True), (1.25, False)):
        ours = (exact * (1 + ulps * torch.finfo(torch.float32).eps)).float()
        with pytest.raises(AssertionError, match="relative L2"):
            assert_as_accurate_as_stock(ours, stock, exact, torch.float32)
        with searched(), nullcontext() if passes else pytest.raises(AssertionError, match="relative L2"):
            assert_as_accurate_as_stock(ours, stock, exact, torch.float32)


def test_a_small_bias_everywhere_fails(product):
    dtype, stock, exact = product
    ours = (exact * (1 + 6 * torch.finfo(dtype).eps)).to(dtype)
    with pytest.raises(AssertionError, match="relative L2"):
        assert_as_accurate_as_stock(ours, stock, exact, dtype)


def test_a_result_rounded_to_a_narrower_dtype_fails():
    a, b = torch.randn(64, 48), torch.randn(48, 32)
    exact = a.double() @ b.double()
    for narrower in (torch.float16, torch.bfloat16):
        with pytest.raises(AssertionError, match="less accurate"):
            assert_as_accurate_as_stock((a @ b).to(narrower).float(), a @ b, exact, torch.float32)


@pytest.mark.parametrize("stock", [1.0, NAN, INF, -INF])
@pytest.mark.parametrize("right", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_must_be_those_of_float64_whatever_stock_has(dtype, right, stock):
    exact = torch.tensor([0.5, right, 2.0], dtype=torch.float64)
    stock = torch.tensor([0.5, stock, 2.0], dtype=dtype)
    assert_as_accurate_as_stock(exact.to(dtype), stock, exact, dtype)
    for wrong in {1.0, NAN, INF, -INF} - {right}:
        with pytest.raises(AssertionError, match=r"NaN or infinity differs.*first at \(1,\)"):
            assert_as_accurate_as_stock(torch.tensor([0.5, wrong, 2.0], dtype=dtype), stock, exact, dtype)


@pytest.mark.parametrize("way", [NAN, INF, -INF])
def test_where_float64_is_finite_a_result_may_overflow_on_the_way_as_stock_does(way):
    exact = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    stock = torch.tensor([0.5, way, 2.0]).half()
    assert_as_accurate_as_stock(stock.clone(), stock, exact, torch.float16)
    assert_as_accurate_as_stock(exact.half(), stock, exact, torch.float16)
    for other in {NAN, INF, -INF} - {way}:
        with pytest.raises(AssertionError, match=r"NaN or infinity differs.*first at \(1,\)"):
            assert_as_accurate_as_stock(torch.tensor([0.5, other, 2.0]).half(), stock, exact, torch.float16)
    with pytest.raises(AssertionError, match="less accurate"):
        assert_as_accurate_as_stock(torch.tensor([0.5, 1.1, 2.0]).half(), stock, exact, torch.float16)


def test_what_passes_a_dtypes_range_is_infinite():
    exact = torch.tensor([0.5, 1e5, -1e5], dtype=torch.float64)
    ours = torch.tensor([0.5, INF, -INF]).half()
    largest = torch.tensor([0.5, 65504.0, -65504.0]).half()
    assert_as_accurate_as_stock(ours, torch.full_like(ours, NAN), exact, torch.float16)
    for stock, wrong in ((ours, largest), (ours, -ours), (largest, -ours)):
        with pytest.raises(AssertionError, match=r"NaN or infinity differs.*first at \(1,\)"):
            assert_as_accurate_as_stock(wrong, stock, exact, torch.float16)


def test_right_specials_pass_and_do_not_hide_the_rest():
    stock = torch.tensor([0.5, float("inf"), float("nan"), -float("inf")])
    assert_as_accurate_as_stock(stock.clone(), stock, stock.double(), torch.float32)
    ours = stock.clone()
    ours[0] = 0.6
    with pytest.raises(AssertionError, match=r"worst at \(0,\)"):
        assert_as_accurate_as_stock(ours, stock, stock.double(), torch.float32)


def test_shape_and_dtype_must_agree():
    x = torch.zeros(3)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_as_accurate_as_stock(x[None], x, x.double(), torch.float32)
    with pytest.raises(AssertionError, match=r"ours is torch\.float16"):
        assert_as_accurate_as_stock(x.half(), x, x.double(), torch.float32)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_as_accurate_as_stock(x, x, x, torch.float32)


def test_empty_outputs_pass():
    x = torch.zeros(0, 4)
    assert_as_accurate_as_stock(x, x, x.double(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [1.0, 1.5, 3.0, 1000.0, 0.1])
def test_unit_in_last_place_is_the_spacing_of_the_dtype(magnitude, dtype):
    x = torch.tensor(magnitude, dtype=dtype)
    above = torch.nextafter(x, torch.tensor(float("inf"), dtype=dtype))
    assert unit_in_last_place(x.item(), dtype) == above.item() - x.item()
