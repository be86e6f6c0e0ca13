"""BatchNorm as part of the convolution before it: what inference computes, in one pass less over each tensor."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# Of the largest output, in float64.
ROUNDING = 1e-9


@torch.no_grad()
def folded(model: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
    """A copy of `model`, which is in evaluation mode, float32 and on the CPU, with every BatchNorm folded that can be.

    A pass over one image shows which norm takes the output of which convolution. `model` itself comes back where no
    norm does, or where the copy answers otherwise in float64 by more than rounding.

    image_shape: channels, height and width.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    copied = copy.deepcopy(model).double()
    image = torch.randn(1, *image_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    try:
        expected, pairs = _watched(copied, image)
        for convolution, norm in pairs:
            _fold(copied, convolution, norm)
        answer = logits_of(copied(image))
    except RuntimeError:  # a model with a float32 of its own
        return model
    exact = torch.allclose(answer, expected, rtol=0, atol=ROUNDING * expected.abs().max().item())
    return copied.float() if exact else model


def logits_of(answer: Any) -> Tensor:
    """timm's models return logits, transformers' an object that has them."""
    return getattr(answer, "logits", answer)


def _watched(model: nn.Module, image: Tensor) -> tuple[Tensor, list[tuple[str, str]]]:
    """The logits, and the names of each convolution and the norm that took its output."""
    made: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, so that no two have one id
    pairs = []

    def convolved(name: str, _: nn.Module, __: Any, output: Tensor) -> None:
        made[id(output)] = name, output

    def normalized(name: str, norm: Any, inputs: tuple[Tensor, ...], _: Any) -> None:
        if id(inputs[0]) in made and norm.running_mean is not None:
            pairs.append((made[id(inputs[0])][0], name))

    watch: dict[Any, Any] = {nn.Conv2d: convolved, nn.BatchNorm2d: normalized}
    hooks = [
        module.register_forward_hook(partial(note, name))
        for name, module in model.named_modules()
        for kind, note in watch.items()
        if isinstance(module, kind)
    ]
    logits = logits_of(model(image))
    for hook in hooks:
        hook.remove()
    return logits, pairs


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    conv: Any = model.get_submodule(convolution)
    bn: Any = model.get_submodule(norm)
    statistics = bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
    # timm's BatchNormAct2d goes on with what follows it.
    model.set_submodule(norm, nn.Sequential(bn.drop, bn.act) if hasattr(bn, "act") else nn.Identity())
