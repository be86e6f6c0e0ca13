"""The last block of a classifier gives no more than the rows that are read: who says so, and when it may."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deit_fast.nn import guards, parts
from deit_fast.nn.parts import Part


@contextmanager
def reading(last_block: Part, rows: int) -> Iterator[None]:
    """Within, no more than the first `rows` rows of `last_block`'s result are read, and it gives no more.

    For swapped classes that ask for it (`rows_read`): their `readout_rows` is None at all other times.
    """
    last_block.readout_rows = (rows, _caller())
    try:
        yield
    finally:
        last_block.readout_rows = None


def rows_read(block: Part) -> int:
    """How many rows of this call's result are read; 0 for all."""
    if block.readout_rows is None:
        return 0
    rows, caller = block.readout_rows
    return rows if caller == _caller() else 0


def _caller() -> tuple | None:
    """What is another in another thread, and in a checkpoint: its block is called again when `reading` is over.

    None while compiling, where one graph holds both calls.
    """
    if torch.compiler.is_compiling():
        return None
    return threading.get_ident(), torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(False)


def last_block_unfusable(blocks: Part, norm: Part) -> str | None:
    """Why the last of `blocks` must be computed whole although only its first rows are read, or None.

    blocks: the Sequential of them; norm: what follows it.
    """
    if not blocks._modules:
        return "there is no block"
    reason = parts.unfusable(blocks, parts.SEQUENCES)
    if reason is not None:
        return f"the sequence of blocks {reason}"
    reason = last_norm_unfusable(norm)
    if reason is not None:
        return reason
    last = blocks._modules[next(reversed(blocks._modules))]
    if used_again(blocks, last):
        return "the last block is used more than once"
    reason = parts.unfusable(last, parts.BLOCKS) or guards.block_unfusable(last)
    return None if reason is None else f"the last block: {reason}"


def last_norm_unfusable(norm: Part) -> str | None:
    """Why rows of what `norm` gives may hang on rows that are not read, or None: LayerNorm works by rows."""
    if parts.is_identity(norm):
        return None
    reason = parts.unfusable(norm, parts.LAYER_NORMS) or guards.layer_norm_unfusable(norm)
    return None if reason is None else f"the last norm {reason}"


def used_again(blocks: Part, last: Part) -> bool:
    """Whether a module is not the last of `blocks` alone: the rows that are read are its last call's."""
    return list(blocks._modules.values()).count(last) > 1
