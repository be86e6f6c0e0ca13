"""The most that a device can do: as its vendor publishes, or as measured here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from deit_fast.benchmark import devices
from deit_fast.benchmark.clock import Clock
from deit_fast.benchmark.contenders import DTYPES
from deit_fast.kernels.launching import tf32

# The side of a square product, and the bytes of a copy.
_SIDE = {"cuda": 8192, "cpu": 2048}
_COPIED = {"cuda": 2**30, "cpu": 2**28}


@dataclass(frozen=True)
class Peaks:
    """flops: operations a second of matrix products, by dtype. bandwidth: bytes a second of memory."""

    flops: dict[str, float]
    bandwidth: float
    source: str

    def bound(self, dtype: str, flops: float | None, moved: float) -> float | None:
        """Seconds that `flops` of products in `dtype` and `moved` bytes take at least; None for an unknown dtype."""
        if dtype not in self.flops:
            return None
        return max((flops or 0) / self.flops[dtype], moved / self.bandwidth)


def published(device: torch.device) -> Peaks | None:
    """By the data sheet; None for a device that is not in the table."""
    found = devices.device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found is None:
        return None
    # Three TF32 products for a float32 one, where the user allows no TF32: as the kernels compute them.
    split = found.fp32 if found.tf32 is None else max(found.fp32, found.tf32 / 3)
    float32 = found.tf32 if found.tf32 and tf32.is_allowed() else split
    flops = {"float32": float32, "bfloat16": found.bf16, "float16": found.bf16}
    return Peaks({name: 1e12 * rate for name, rate in flops.items()}, 1e9 * found.bandwidth, found.source)


def measured(device: torch.device, dtypes: list[str], clock: Clock) -> Peaks:
    """The vendor's own square product in each dtype, and a copy that reads as much as it writes."""
    side = _SIDE[device.type]
    flops = {}
    for name in dtypes:
        left, right = (torch.randn(side, side, device=device, dtype=DTYPES[name]) for _ in range(2))
        flops[name] = 2 * side**3 / _seconds(partial(torch.matmul, left, right), clock)
    source = torch.empty(_COPIED[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _seconds(lambda: target.copy_(source), clock)
    return Peaks(flops, bandwidth, f"measured here: a product of {side}×{side} matrices, a copy")


def _seconds(call: Callable[[], object], clock: Clock) -> float:
    calls = clock.calls(call)
    return min(clock.seconds(call, calls) for _ in range(3))
