"""A block's step, ours and in plain PyTorch, for the steps that launch, compare and time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deit_fast import nn as ours
from deit_fast.benchmark import plain

HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """Of a block and what it is given."""

    width: int
    batch: int
    tokens: int = 198
    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    drop_path: float = 0.0

    @property
    def title(self) -> str:
        return f"width {self.width}, batch {self.batch}, {'training' if self.training else 'inference'}"


@dataclass
class BlockStep:
    """Calling it runs the block once, forward and in training backward; it returns the output and all gradients."""

    block: nn.Module
    x: Tensor
    gradient: Tensor

    def __call__(self) -> list[Tensor]:
        with torch.set_grad_enabled(self.block.training):
            y = self.block(self.x)
        if not self.block.training:
            return [y]
        return [y, *torch.autograd.grad(y, [self.x, *self.block.parameters()], self.gradient)]


def steps(shape: Shape, device: torch.device) -> tuple[BlockStep, BlockStep]:
    """Plain PyTorch's and ours, with the same weights and input."""
    heads = shape.width // HEAD_DIM
    torch.manual_seed(0)
    stock = plain.Block(shape.width, heads, drop_path=shape.drop_path)
    block = ours.Block(shape.width, heads, qkv_bias=True, drop_path=shape.drop_path)
    block.load_state_dict(stock.state_dict())
    size = (shape.batch, shape.tokens, shape.width)
    x, gradient = (torch.randn(size, device=device, dtype=shape.dtype) for _ in range(2))
    x.requires_grad_(shape.training)
    of_stock, of_ours = (
        BlockStep(each.to(device, shape.dtype).train(shape.training), x, gradient) for each in (stock, block)
    )
    return of_stock, of_ours


def launch_block(device: torch.device, shape: Shape, amp: torch.dtype | None = None) -> None:
    """Makes the launches of our block's step, in autocast to `amp`, for their kernels to be compiled."""
    _, step = steps(shape, device)
    with torch.autocast(device.type, amp, enabled=amp is not None):
        step()
