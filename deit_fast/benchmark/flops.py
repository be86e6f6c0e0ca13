"""Floating-point operations as `torch.utils.flop_counter` counts them, of stock and swapped models on the CPU."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from deit_fast.benchmark.outputs import summed


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **options: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


# torch has formulas for its attention on GPUs only; these give the CPU's the same convention.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _NoModules:
    """In place of the counter's module tracker, whose hooks on every module would put a swapped model on stock code."""

    parents = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


def flop_counter() -> FlopCounterMode:
    import deit_fast.ops.flops  # noqa: F401  (registers the operators' formulas)

    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    tracker: Any = _NoModules()
    counter.mod_tracker = tracker
    return counter


class WithoutProducts(TorchDispatchMode):
    """Operators with a FLOP formula return memory of the right shape, unwritten, without being computed.

    All others run, those that draw drop path's masks among them, so the calls and the counts are those of a real run
    of any size at little cost. Counters go inside.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in ATTENTION:
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Tensor, lambda tensor: _empty(tensor, "meta"), (args, kwargs or {}))
        return tree_map_only(Tensor, lambda tensor: _empty(tensor, "cpu"), func(*args, **kwargs))


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def step_flops(model: nn.Module, pixels: Tensor) -> int:
    """Of one training step's forward and backward. pixels: [B, C, H, W], on the CPU."""
    with flop_counter() as counter:
        summed(model(pixels)).backward()
    return counter.get_total_flops()
