"""What `deit_fast.swap` was asked for, as its modules carry it; a module that was asked nothing has the default."""

from torch.nn import Module

MEMORIES = ("balanced", "low")


def check_memory(memory: str) -> None:
    """Refuse a name that means nothing.

    Raises:
        ValueError: `memory` is none of `MEMORIES`.
    """
    if memory not in MEMORIES:
        raise ValueError(f"memory must be one of {', '.join(MEMORIES)}; got {memory!r}")


def memory_of(block: Module) -> str:
    """What `block` keeps for backward: "balanced" or "low"."""
    return block.__dict__.get("_deit_fast_memory", "balanced")


def readout_wanted(model: Module) -> bool:
    """Whether `model` may compute its last block for the rows it reads alone."""
    return model.__dict__.get("_deit_fast_readout", True)


def compact(model: Module) -> bool:
    """Whether `model` may wait for the device once a step, to keep no room for dropped samples."""
    return model.__dict__.get("_deit_fast_compact", False)
