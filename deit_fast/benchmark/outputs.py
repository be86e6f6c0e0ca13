"""What models of different libraries return, as tensors."""

from typing import Any

from torch import Tensor


def heads(output: Any) -> tuple[Tensor, ...]:
    """The logits of every head: a model returns a tensor, one for each head, or transformers' output."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tuple):
        return output
    if getattr(output, "cls_logits", None) is not None:
        return output.cls_logits, output.distillation_logits
    return (output.logits,)


def summed(output: Any) -> Tensor:
    """The sum of what a model returned."""
    total: Any = sum(each.sum() for each in heads(output))
    return total
