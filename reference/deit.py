"""The whole DeiT as a function of its images and its state dict.

DeiT: arXiv 2012.12877; DeiT III: arXiv 2204.07118.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from reference.block import block
from reference.drop_path import drop_path_scale
from reference.layer_norm import layer_norm
from reference.linear import linear
from reference.patch_embed import patch_embed


def deit_features(
    images: Tensor,
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    eps: float = 1e-6,
    drop_path_rates: Sequence[float] | None = None,
) -> Tensor:
    """Tokens after the last LayerNorm, [B, R+P, D]: patch embedding, the blocks one after another, LayerNorm.

    images: [B, C, H, W]; state_dict: in timm's names. Depth, widths, distillation token, LayerScale and the
    positions' convention follow from the names and shapes in it; the number of heads doesn't, so it is an
    argument. drop_path_rates: in training, one probability a block; each block draws for its attention, then
    for its MLP.
    """
    x = patch_embed(
        images,
        state_dict["patch_embed.proj.weight"],
        state_dict.get("patch_embed.proj.bias"),
        state_dict["pos_embed"],
        state_dict["cls_token"],
        state_dict.get("dist_token"),
    )
    depth = sum(name.endswith("norm1.weight") for name in state_dict)
    for index in range(depth):
        prefix = f"blocks.{index}."
        parameters = {
            name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)
        }
        rate = drop_path_rates[index] if drop_path_rates else 0.0
        scales = [drop_path_scale(x, rate) if rate else None for _ in range(2)]
        x = block(x, parameters, num_heads, eps, *scales)
    return layer_norm(x, state_dict["norm.weight"], state_dict["norm.bias"], eps)


def deit(
    images: Tensor,
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    eps: float = 1e-6,
    drop_path_rates: Sequence[float] | None = None,
    training: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Logits [B, num_classes]: a linear layer on the class token.

    A distilled model has a second linear layer on its distillation token. In training it gives both, (class,
    distillation); else the mean of their logits, as the original repository computes it (section 4 of the
    paper adds the two softmaxes).
    """
    x = deit_features(images, state_dict, num_heads, eps, drop_path_rates)
    logits = linear(x[:, 0], state_dict["head.weight"], state_dict["head.bias"])
    if "dist_token" not in state_dict:
        return logits
    dist_logits = linear(x[:, 1], state_dict["head_dist.weight"], state_dict["head_dist.bias"])
    return (logits, dist_logits) if training else (logits + dist_logits) / 2
