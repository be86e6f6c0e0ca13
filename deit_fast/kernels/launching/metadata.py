"""By what profilers tell launches apart, and what Triton's Proton shows achieved rates from.

Proton shows a launch's operator, shape, dtype and what is fused, `linear 50688x1152x384 bf16 layer_norm+bias`.
Profilers of GPU functions show the symbol, `linear_kernel_layer_norm_bias_128x128x64`: what is fused and the tile are
known where a kernel is compiled, M is not.
"""

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Of arguments that are not called after what they are there for.
_WORDS = {
    "k_weight_ptr": "qkv", "k_grad_ptr": "qkv", "rstd_ptr": "layer_norm", "std_ptr": "normalise", "sum_ptr": "bias",
    "drop_path_scale_ptr": "drop_path",
}  # fmt: skip
_TILE = ("WIDTH", "HEAD_DIM", "HIDDEN", "ROWS", "BLOCK")


def described(
    kernel: str,
    shape: Callable[[dict], Sequence[int]],
    fused: Sequence[str] = (),
    flops: Callable[[dict], int] | None = None,
) -> dict[str, Callable]:
    """Arguments of `triton.jit` for the function `kernel`, by which its launches have names of their own.

    shape: of a launch's work, from its arguments by name; of a matrix product (M, N, K).
    fused: the arguments that choose what a launch does besides, in the order in which it does it.
    flops: of a launch, from its arguments by name, two a multiply-add.

    A launch also tells its bytes, every tensor once. Samples that drop path drops count too: how many they are only the
    device knows.
    """

    def launch_metadata(grid: tuple, compiled: Any, arguments: dict) -> dict:
        tensors = {id(value): value for value in arguments.values() if isinstance(value, Tensor)}.values()
        # Products run in the narrowest dtype: under autocast the stream beside them is float32.
        dtype = min((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: dtype.itemsize)
        name = [kernel.removesuffix("_kernel"), "x".join(map(str, shape(arguments))), _DTYPES[dtype]]
        words = "+".join(_words(fused, arguments))
        found = {
            "name": " ".join([*name, words] if words else name),
            "symbol": compiled.name,
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
        }
        if flops is not None:
            found[f"flops{8 * dtype.itemsize}"] = flops(arguments)
        return found

    def symbol(specialization: Any) -> str:
        # By name: a tensor's type, or the value that is compiled in, None of a tensor that is not given.
        arguments = specialization.signature | specialization.constants
        tile = (str(value) for name, value in arguments.items() if name.endswith(_TILE) and type(value) is int)
        return "_".join(filter(None, [kernel, *_words(fused, arguments), "x".join(tile)]))

    return {"launch_metadata": launch_metadata, "repr": symbol}


def _words(fused: Sequence[str], arguments: dict) -> Iterator[str]:
    for name in fused:
        value = arguments[name]
        if name.isupper() and isinstance(value, str):
            if value != "none":
                yield value
        elif value is not None and value is not False:
            yield _WORDS.get(name, name.removesuffix("_ptr").lower())


def described_product(
    kernel: str, shape: Callable[[dict], tuple[int, int, int]], fused: Sequence[str] = ()
) -> dict[str, Callable]:
    """As `described`, for a kernel that does nothing but the product of `shape` (M, N, K), and what is fused."""
    return described(kernel, shape, fused, flops=lambda arguments: 2 * prod(shape(arguments)))


def linear_shape(arguments: dict) -> tuple[int, int, int]:
    """Of a product of [rows, in_features] and [in_features, out_features], or of three with the weights of k and v."""
    products = sum(arguments[name] is not None for name in ("weight_ptr", "k_weight_ptr", "v_weight_ptr"))
    return arguments["rows"], products * arguments["out_features"], arguments["in_features"]


def attention_shape(arguments: dict) -> tuple[int, ...]:
    """Samples, heads, queries, keys unless they are as many, and a head's width."""
    samples, heads, _ = arguments["log_sum_exp_ptr"].shape
    tokens = dict.fromkeys((arguments["queries"], arguments["keys"]))
    return samples, heads, *tokens, arguments["HEAD"] + arguments["TAIL"]


def patch_values(arguments: dict) -> int:
    """A patch's pixels in all channels."""
    return arguments["CHANNELS"] * arguments["PATCH_HEIGHT"] * arguments["PATCH_WIDTH"]
