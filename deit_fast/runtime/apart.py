"""Passes of a model that leave nothing behind and find nothing left."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def apart() -> Iterator[None]:
    """Within, tensors are ordinary ones also in inference mode, and autocast keeps no weight that it has cast.

    An inference tensor can't be written, or saved for backward, outside of that mode. A kept weight has the dtype and
    the memory of the pass that cast it first.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
