"""Models with the module structure of the original DeiT repository: the same names of children and parameters."""

from functools import partial

import torch
from timm.layers import DropPath, Mlp, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop((q @ k.transpose(2, 3) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, width)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, attn_drop: float, drop_path: float, norm_layer, attention) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attention(dim, num_heads, attn_drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LayerScaleBlock(Block):
    def __init__(self, dim: int, *args) -> None:
        super().__init__(dim, *args)
        self.gamma_1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((dim,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class DeiT3(nn.Module):
    """DeiT III as that repository builds it: positions for patches alone, and the class token read by hand."""

    def __init__(
        self,
        block: type[nn.Module] = LayerScaleBlock,
        attention: type[nn.Module] = Attention,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        dim: int = 64,
        depth: int = 2,
    ) -> None:
        super().__init__()
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed = PatchEmbed(32, 8, embed_dim=dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, dim))
        self.blocks = nn.ModuleList([block(dim, 2, attn_drop, drop_path, norm_layer, attention) for _ in range(depth)])
        self.norm = norm_layer(dim)
        self.head = nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class DistilledVisionTransformer(VisionTransformer):
    """The distilled DeiT as that repository builds it: a subclass of timm's, with an embedding of its own."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 2, self.embed_dim))
        self.head_dist = nn.Linear(self.embed_dim, self.num_classes)

    def forward_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(x)
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        x = self.pos_drop(torch.cat((*prefix, x), dim=1) + self.pos_embed)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1]

    def forward(self, x: Tensor) -> Tensor:
        features, dist_features = self.forward_features(x)
        return (self.head(features) + self.head_dist(dist_features)) / 2
