"""The rule every kernel's result is held to (`deit_fast/check/accuracy.py` has it and its numbers), as an assertion."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deit_fast.check.accuracy import allowed_errors, errors, same_specials, unit_in_last_place, within

__all__ = ["assert_as_accurate_as_stock", "errors", "searched", "unit_in_last_place"]

_searched = False


@contextmanager
def searched() -> Iterator[None]:
    """Cases within were drawn in a search for what fails."""
    global _searched
    previous, _searched = _searched, True
    try:
        yield
    finally:
        _searched = previous


def assert_as_accurate_as_stock(
    ours: Tensor, stock: Tensor, exact: Tensor, dtype: torch.dtype, name: str = "output"
) -> None:
    """Fails unless `ours` is as accurate as `stock` by the rule above.

    ours, stock: results in `dtype`, of one shape, from the same input. exact: the float64 result.
    NaN and infinities must stand where `exact` has them, with the same sign: see `same_specials`.
    """
    assert ours.shape == stock.shape == exact.shape, (
        f"{name}: shapes differ: ours {tuple(ours.shape)}, stock {tuple(stock.shape)}, exact {tuple(exact.shape)}"
    )
    assert ours.dtype == stock.dtype == dtype, f"{name}: ours is {ours.dtype}, stock {stock.dtype}, not {dtype}"
    assert exact.dtype == torch.float64, f"{name}: the reference must be float64, not {exact.dtype}"
    if not exact.numel():
        return
    ours, stock, exact = ours.detach(), stock.detach(), exact.detach()
    _assert_same_specials(ours, stock, exact, name)

    ours_is, stock_is = errors(ours, exact), errors(stock, exact)
    allowed = allowed_errors(stock_is, exact, dtype, _searched)
    if within(ours_is, allowed, exact.numel()):
        return
    magnitude = exact[exact.isfinite()].abs().max().item() if exact.isfinite().any() else 0.0
    worst = _index((ours.double() - exact).abs().nan_to_num(nan=0.0, posinf=0.0).argmax().item(), exact.shape)
    raise AssertionError(
        f"{name} {tuple(exact.shape)} {dtype} is less accurate than the stock operator\n"
        f"                      ours       stock      allowed\n"
        f"  largest error       {ours_is.largest:<10.3g} {stock_is.largest:<10.3g} {allowed.largest:.3g}\n"
        f"  relative L2 error   {ours_is.relative:<10.3g} {stock_is.relative:<10.3g} {allowed.relative:.3g}\n"
        f"  worst at {worst}: ours {ours[worst].item():.8g}, stock {stock[worst].item():.8g}, "
        f"exact {exact[worst].item():.8g}; largest exact magnitude {magnitude:.3g}"
    )


def _assert_same_specials(ours: Tensor, stock: Tensor, exact: Tensor, name: str) -> None:
    same = same_specials(ours, stock, exact)
    if same.all():
        return
    first = _index((~same).flatten().int().argmax().item(), ours.shape)
    raise AssertionError(
        f"{name} {tuple(ours.shape)} {ours.dtype}: NaN or infinity differs from the reference's at "
        f"{int((~same).sum())} of {same.numel()} elements, first at {first}: "
        f"ours {ours[first].item()}, stock {stock[first].item()}, exact {exact[first].item()}"
    )


def _index(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(i.item() for i in torch.unravel_index(torch.tensor(flat), shape))
