"""DeiT in plain PyTorch with timm's names: what stock means where timm is not installed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deit_fast.models.config import DeiTConfig


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """drop_path: the rate at which a training sample's branches are left out, as timm draws them."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, eps: float = 1e-6, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, D]."""
        x = x + self._kept(self.attn(self.norm1(x)))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, branch: Tensor) -> Tensor:
        if self.drop_path == 0.0 or not self.training:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep).div_(keep)


class _PatchEmbed(nn.Module):
    def __init__(self, config: DeiTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_chans, config.embed_dim, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DeiT, with or without the distillation token; `deit_fast.models.VisionTransformer` takes its state dict."""

    def __init__(self, config: DeiTConfig, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        width = config.embed_dim
        self.patch_embed = _PatchEmbed(config)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.dist_token = nn.Parameter(0.02 * torch.randn(1, 1, width)) if config.distilled else None
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, config.num_positions, width))
        self.blocks = nn.Sequential(
            *(
                Block(width, config.num_heads, config.mlp_ratio, config.layer_norm_eps, rate)
                for rate in torch.linspace(0, drop_path_rate, config.depth, device="cpu").tolist()
            )
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_classes)
        self.head_dist = nn.Linear(width, config.num_classes) if config.distilled else None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """images: [B, 3, H, W]. Logits [B, classes]; of a distilled model both heads' in training, else their mean."""
        x = self.patch_embed(images)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token) if token is not None]
        x = self.norm(self.blocks(torch.cat([*prefix, x], dim=1) + self.pos_embed))
        logits = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        dist_logits = self.head_dist(x[:, 1])
        return (logits, dist_logits) if self.training else (logits + dist_logits) / 2
