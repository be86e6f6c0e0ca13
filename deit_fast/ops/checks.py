"""Argument checks shared by the operators: each raises one error that says what was wrong and what is right."""

import torch
from torch import Tensor

from deit_fast.kernels.launching import hardware

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    device = x.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"deit_fast.{op}: {name} is on {other.device}, the input on {device}; move one of them")


def vector(op: str, name: str, tensor: Tensor | None, length: int) -> None:
    if tensor is not None and tensor.shape != (length,):
        raise ValueError(f"deit_fast.{op}: {name} must have shape ({length},), got {tuple(tensor.shape)}")


def matrix(op: str, name: str, tensor: Tensor, columns: int) -> None:
    if tensor.ndim != 2 or tensor.shape[1] != columns:
        raise ValueError(
            f"deit_fast.{op}: {name} must have shape (out_features, {columns}) to fit an input of width "
            f"{columns}, got {tuple(tensor.shape)}"
        )


def floating(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"deit_fast.{op}: {name} must be a floating-point tensor, got {tensor.dtype}")


def at_least_1d(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim == 0:
        raise ValueError(f"deit_fast.{op}: {name} must have at least one dimension, got a scalar")


def token_sequence(op: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim != 3:
        raise ValueError(
            f"deit_fast.{op}: {name} must be a token sequence [batch, tokens, width], got {tuple(tensor.shape)}"
        )


def heads_divide(op: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ValueError(f"deit_fast.{op}: a width of {width} does not divide into {heads} heads")


def same_dtype(op: str, x: Tensor, weight: Tensor) -> None:
    """Outside autocast the input must have the weight's dtype, as the stock operators demand."""
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"deit_fast.{op}: the input is {x.dtype} and the weight {weight.dtype}; "
            f"cast one of them or run under torch.autocast"
        )


def kernel_dtypes(*tensors: Tensor | None) -> str | None:
    """Why the kernels can't take these tensors, or None."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype not in KERNEL_DTYPES:
            return f"no kernel for {tensor.dtype}"
    return hardware.no_kernels(given[0])


def kernel_products(weight: Tensor, *tensors: Tensor | None) -> str | None:
    """The same for an operator that multiplies matrices of `weight`'s dtype."""
    return hardware.no_products(weight) or kernel_dtypes(weight, *tensors)
