"""Operators' own examples, small, as positional arguments of the operators and of the functions that call them."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from deit_fast import ops
from deit_fast.ops.examples import Inputs, Size
from deit_fast.ops.operator import OPERATORS, BackwardOperator

FORWARD = {name: operator for name, operator in OPERATORS.items() if not isinstance(operator, BackwardOperator)}


def public(name: str):
    """The function of an operator by the name of one of its examples, "attention, separate q, k, v"."""
    return getattr(ops, name.partition(",")[0])


def packet(name: str):
    return getattr(torch.ops.deit_fast, name.partition(",")[0]).default


def tensors(arguments: tuple) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def examples(size: Size, new: Inputs, inference: bool = True) -> dict[str, tuple]:
    """All arguments of every operator's examples, by their names. inference: with those for inference alone."""
    return {
        ", ".join(filter(None, (name, example.title))): tuple(operator.Arguments(**example.arguments))
        for name, operator in FORWARD.items()
        for example in operator.examples(size, new)
        if inference or not example.inference
    }
