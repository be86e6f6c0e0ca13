"""A model from its checkpoint alone."""

import os
import warnings

import torch

from deit_fast.models.checkpoint import load_checkpoint, load_weights
from deit_fast.models.deit import VisionTransformer
from deit_fast.models.inspection import inspect, known_as
from deit_fast.models.registry import real_device


def load_model(
    checkpoint: str | os.PathLike,
    *,
    memory: str = "balanced",
    readout: bool = True,
    compact_drop_path: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VisionTransformer:
    """The model that `checkpoint`, whatever `create_model` takes, holds.

    Its sizes are those of the tensors, unless the file says them. Its attention heads are what the file or a folder's
    config.json says, else those of the known models of this size, and a warning says so.

    memory, readout, compact_drop_path: as of `deit_fast.swap`. device, dtype: of the parameters; torch's defaults.

    Raises:
        ValueError: no DeiT (the message lists every missing, unexpected and misshapen key), one that isn't computed as
            a DeiT, or of unknown heads; an unreadable file; `device` is meta; no such `memory`.
        FileNotFoundError: nothing there.
    """
    on = real_device(device)
    loaded = load_checkpoint(checkpoint)
    config, _, assumed = inspect(loaded)
    if assumed and known_as(config) is None:
        raise ValueError(f"{checkpoint} doesn't say which model it holds, {assumed[0]}: name it to create_model")
    for assumption in assumed:
        warnings.warn(f"{checkpoint}: taken to have {assumption}", stacklevel=2)
    model = VisionTransformer(
        config, device="meta", dtype=dtype, memory=memory, readout=readout, compact_drop_path=compact_drop_path
    )
    load_weights(model, loaded, on)
    return model
