"""A small convolutional network: what a DeiT is distilled from."""

from torch import nn


def conv_net(num_classes: int, in_chans: int = 3, width: int = 32) -> nn.Sequential:
    """Images [B, in_chans, H, W], H and W at least 8, to logits [B, num_classes]."""
    return nn.Sequential(
        *_stage(in_chans, width),
        *_stage(width, 2 * width),
        *_stage(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def _stage(in_chans: int, out_chans: int) -> list[nn.Module]:
    """3 × 3 convolution, then half the resolution."""
    return [
        nn.Conv2d(in_chans, out_chans, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(out_chans),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]
