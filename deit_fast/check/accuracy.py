"""The rule every kernel's result is held to, and the one table of its numbers.

    error(ours) ≤ 2 × error(the stock PyTorch operator, same dtype, same input), against float64

The error is the relative L2 norm, which finds a small bias in all elements and hardly moves with the seed. The
largest absolute error is held to a wider factor, to find one wrong element among many. Either may instead meet
its floor, since stock can be exact by luck (one product of powers of two) where a right kernel rounds once.

NaN and infinity are held to float64 too: what stock makes of them differs from one processor to the next.
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
# Of the thousands of cases that a search draws the most extreme roundings are looked for, and some pass what one case
# would hardly pass: in 20 minutes one or two by up to 1.6 times. A lost digit is ten times.
SEARCHED_FACTOR = 2.0
# A model, or another library's operator, computes something else, and is not timed, where its relative error is more
# than so many times its stock form's.
WRONG_FACTOR = 4.0
# Where the stock form's own error is smaller than the rounding of one number.
WRONG_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
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


def relative_error(result: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """L2 norm of the difference over that of `exact`, or over `least` if that is larger; NaN where an element is.

    Both of one shape and any floating dtype.
    """
    exact = exact.double()
    return (result.double() - exact).norm().item() / max(exact.norm().item(), least, 1e-30)


def refuse_wrong(error: float, of_stock: float, dtype: torch.dtype, what: str) -> None:
    """
    Raises:
        ArithmeticError: `error` is more than `WRONG_FACTOR` times that of the stock `what`, in `dtype`.
    """
    if not error <= max(WRONG_FACTOR * of_stock, WRONG_FLOOR[dtype]):
        raise ArithmeticError(f"wrong: error {error:.1e} against float64, the stock {what}'s is {of_stock:.1e}")


def unit_in_last_place(magnitude: float, dtype: torch.dtype) -> float:
    """Spacing of `dtype` at `magnitude`; of its subnormals at zero."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(torch.tensor(max(magnitude, info.tiny), dtype=torch.float64)).exponent.item()
    return info.eps * 2.0 ** (exponent - 1)


def allowed_errors(stock: Errors, exact: Tensor, dtype: torch.dtype, searched: bool = False) -> Errors:
    """What a result in `dtype` may have where the stock operator's has `stock`; more if a search chose the case."""
    finite = exact[exact.isfinite()]
    magnitude = finite.abs().max().item() if finite.numel() else 0.0
    factor = SEARCHED_FACTOR if searched else 1.0
    return Errors(
        factor * max(LARGEST_FACTOR * stock.largest, FLOOR_ULPS * unit_in_last_place(magnitude, dtype)),
        factor * max(STOCK_FACTOR * stock.relative, FLOOR_EPS * torch.finfo(dtype).eps),
    )


def within(ours: Errors, allowed: Errors, elements: int) -> bool:
    return ours.largest <= allowed.largest and (elements < FEW or ours.relative <= allowed.relative)


def same_specials(ours: Tensor, stock: Tensor, exact: Tensor) -> Tensor:
    """Where `ours` is NaN or infinite just where it should be; a bool tensor of their shape.

    That is where `exact`, rounded to the dtype, is. Where `exact` is finite before it is rounded, the way to the result
    may overflow, and `ours` may be what `stock` is.
    """
    mine = _specials(ours)
    return (mine == _specials(exact.to(ours.dtype))) | exact.isfinite() & (mine == _specials(stock))


def _specials(x: Tensor) -> Tensor:
    """0 where `x` is finite, 1 and -1 where it is infinite, 2 where it is NaN."""
    return torch.where(x.isnan(), 2, x.isinf() * x.sign())
