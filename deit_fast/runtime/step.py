"""One pass over a model or a part of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def step(call: Callable[[], object], differentiable: Sequence[Tensor]) -> None:
    """Forward, and where there is something to differentiate by, backward; no gradient is left in any tensor."""
    with torch.set_grad_enabled(bool(differentiable)):
        outputs = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor)]
    if differentiable:
        found = [output for output in outputs if output.requires_grad]
        torch.autograd.grad(found, differentiable, [torch.ones_like(each) for each in found], allow_unused=True)
