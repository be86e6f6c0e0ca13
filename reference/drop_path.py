"""Stochastic depth by sample (Huang et al., arXiv 1603.09382), as DeiT uses it."""

from torch import Tensor


def drop_path_scale(x: Tensor, drop_prob: float) -> Tensor:
    """One factor a sample, [B] in x's dtype: 0 with probability drop_prob, else 1 / (1 − drop_prob).

    The expected factor is 1. Drawn from x's default generator exactly as timm draws it (one Bernoulli
    variable a sample, with the probability of keeping), so that equal seeds drop equal samples.
    """
    keep_prob = 1 - drop_prob
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
    return (mask / keep_prob if keep_prob > 0 else mask).flatten()


def drop_path(x: Tensor, drop_prob: float, training: bool) -> Tensor:
    """x with whole samples dropped and the rest scaled up in training; x itself in evaluation. x: [B, …]."""
    if not training or drop_prob == 0:
        return x
    return x * drop_path_scale(x, drop_prob).reshape((-1,) + (1,) * (x.ndim - 1))
