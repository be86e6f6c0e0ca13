"""The rule every kernel's result is held to, and the one table of its numbers.

    error(ours) ≤ 2 × error(the stock PyTorch operator, same dtype, same input), against float64

The error is the relative L2 norm, which finds a small bias in all elements and hardly moves with the seed. The
largest absolute error is held to a wider factor, to find one wrong element among many. Either may instead meet
its floor, since stock can be exact by luck (one product of powers of two) where a right kernel rounds once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Different summation orders of one algorithm differ by up to this much; a lost digit is far more.
STOCK_FACTOR = 2.0
# The largest of a few hundred roundings is an extreme value: sums of the same 27 float32 numbers in two orders, by
# 192 columns, had largest errors up to 2.8 times apart in 2000 draws, where their norms were up to 1.4 apart.
LARGEST_FACTOR = 4.0
# Largest absolute error: four units in the last place of the output's largest element. Small elements come
# out of cancellation and inherit the rounding of the large terms, so their own unit says nothing.
FLOOR_ULPS = 4.0
# Relative L2 norm, in units of eps: half a unit each is the most that correctly rounded elements can have.
FLOOR_EPS = 0.5
# Below this many elements the norm is the largest error once more, and only that counts.
FEW = 16


@dataclass(frozen=True)
class Errors:
    """Errors against the float64 reference: largest absolute, and relative in the L2 norm."""

    largest: float
    relative: float


def errors(result: Tensor, exact: Tensor) -> Errors:
    """`result` and `exact` have one shape; only elements finite in both count."""
    finite = result.isfinite() & exact.isfinite()
    exact = exact[finite].double()
    difference = result[finite].double() - exact
    if not difference.numel():
        return Errors(0.0, 0.0)
    scale = exact.norm().item() or 1.0
    return Errors(difference.abs().max().item(), difference.norm().item() / scale)


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at `magnitude`; of its subnormals at zero."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(torch.tensor(max(magnitude, info.tiny), dtype=torch.float64)).exponent.item()
    return info.eps * 2.0 ** (exponent - 1)


def assert_as_accurate_as_stock(
    ours: Tensor, stock: Tensor, exact: Tensor, dtype: torch.dtype, name: str = "output"
) -> None:
    """Fails unless `ours` is as accurate as `stock` by the rule above.

    ours, stock: results in `dtype`, of one shape, from the same input. exact: the float64 result.
    NaN and infinities must stand where the stock operator has them, with the same sign.
    """
    assert ours.shape == stock.shape == exact.shape, (
        f"{name}: shapes differ: ours {tuple(ours.shape)}, stock {tuple(stock.shape)}, exact {tuple(exact.shape)}"
    )
    assert ours.dtype == stock.dtype == dtype, f"{name}: ours is {ours.dtype}, stock {stock.dtype}, not {dtype}"
    assert exact.dtype == torch.float64, f"{name}: the reference must be float64, not {exact.dtype}"
    if not exact.numel():
        return
    ours, stock, exact = ours.detach(), stock.detach(), exact.detach()
    _assert_same_specials(ours, stock, name)

    ours_is, stock_is = errors(ours, exact), errors(stock, exact)
    magnitude = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    allowed = Errors(
        max(LARGEST_FACTOR * stock_is.largest, FLOOR_ULPS * unit_in_last_place(magnitude, dtype)),
        max(STOCK_FACTOR * stock_is.relative, FLOOR_EPS * torch.finfo(dtype).eps),
    )
    few = exact.numel() < FEW
    if ours_is.largest <= allowed.largest and (few or ours_is.relative <= allowed.relative):
        return
    worst = _index((ours.double() - exact).abs().nan_to_num(nan=0.0, posinf=0.0).argmax().item(), exact.shape)
    raise AssertionError(
        f"{name} {tuple(exact.shape)} {dtype} is less accurate than the stock operator\n"
        f"                      ours       stock      allowed\n"
        f"  largest error       {ours_is.largest:<10.3g} {stock_is.largest:<10.3g} {allowed.largest:.3g}\n"
        f"  relative L2 error   {ours_is.relative:<10.3g} {stock_is.relative:<10.3g} {allowed.relative:.3g}\n"
        f"  worst at {worst}: ours {ours[worst].item():.8g}, stock {stock[worst].item():.8g}, "
        f"exact {exact[worst].item():.8g}; largest exact magnitude {magnitude:.3g}"
    )


def _assert_same_specials(ours: Tensor, stock: Tensor, name: str) -> None:
    same = (ours.isnan() == stock.isnan()) & (ours.isinf() == stock.isinf())
    same &= ~ours.isinf() | (ours.sign() == stock.sign())
    if same.all():
        return
    first = _index((~same).flatten().int().argmax().item(), ours.shape)
    raise AssertionError(
        f"{name} {tuple(ours.shape)}: NaN or infinity differs from the stock operator's at "
        f"{int((~same).sum())} of {same.numel()} elements, first at {first}: "
        f"ours {ours[first].item()}, stock {stock[first].item()}"
    )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(i.item() for i in torch.unravel_index(torch.tensor(flat), shape))
