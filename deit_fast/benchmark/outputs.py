"""What models of different libraries return, as tensors."""

from torch import Tensor


def heads(output: object) -> tuple[Tensor, ...]:
    """The logits of every head: a model returns a tensor, one for each head, or transformers' output."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, tuple):
        return output
    if getattr(output, "cls_logits", None) is not None:
        return output.cls_logits, output.distillation_logits
    return (output.logits,)


def summed(output: object) -> Tensor:
    """The sum of what a model returned."""
    return sum(each.sum() for each in heads(output))
