"""The whole DeiT, on the fused modules of `deit_fast.nn`."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deit_fast.models.config import DeiTConfig
from deit_fast.nn import Block, LayerNorm, PatchEmbed, guards, options, parts
from deit_fast.nn.drop_path import can_draw_ahead, drawn_ahead
from deit_fast.nn.forward import block_forward, patch_embed_forward
from deit_fast.nn.readout import last_block_unfusable, last_norm_unfusable


class VisionTransformer(nn.Module):
    """DeiT and DeiT III, with timm's parameter names: state dicts go either way.

    Args:
        config: the hyper-parameters.
        drop_path_rate: of the last block in training, in [0, 1); it rises linearly from 0 at the first.
        device, dtype: of the parameters; torch's defaults.
        memory, readout, compact_drop_path: as of `deit_fast.swap`.

    Raises:
        ValueError: `drop_path_rate` is out of range, `dtype` not floating-point, or there is no such `memory`.
    """

    def __init__(
        self,
        config: DeiTConfig,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        memory: str = "balanced",
        readout: bool = True,
        compact_drop_path: bool = False,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating-point, got {dtype}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = config.embed_dim
        norm_layer = partial(LayerNorm, eps=config.layer_norm_eps)

        self.config = config
        self._deit_fast_readout = readout
        self._deit_fast_compact = compact_drop_path
        self.patch_embed = PatchEmbed(
            img_size=config.img_size,
            patch_size=config.patch_size,
            in_chans=config.in_chans,
            embed_dim=width,
            **factory,
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, width, **factory))
        self.dist_token = nn.Parameter(torch.empty(1, 1, width, **factory)) if config.distilled else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_positions, width, **factory))

        rates = torch.linspace(0, drop_path_rate, config.depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *(
                Block(
                    dim=width,
                    num_heads=config.num_heads,
                    mlp_ratio=config.mlp_ratio,
                    qkv_bias=True,
                    init_values=config.init_values,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    memory=memory,
                    **factory,
                )
                for rate in rates
            )
        )
        self.norm = norm_layer(width, **factory)

        self.head = self._new_head()
        self.head_dist = self._new_head() if config.distilled else None
        self._init_weights()

    def _new_head(self) -> nn.Module:
        """Of the model's classes, dtype and device, as `nn.Linear` starts."""
        if not self.config.num_classes:
            return nn.Identity()
        token = self.cls_token
        return nn.Linear(self.config.embed_dim, self.config.num_classes, device=token.device, dtype=token.dtype)

    def _init_weights(self) -> None:
        """The original repository's: normal with σ = 0.02 for tokens, positions and linear layers, biases 0.

        LayerNorm, LayerScale and the patch convolution keep what their constructors gave them.
        """
        for tensor in (self.cls_token, self.dist_token, self.pos_embed):
            if tensor is not None:
                nn.init.trunc_normal_(tensor, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head; (head, head_dist) of a distilled model, as timm's."""
        return self.head if self.head_dist is None else (self.head, self.head_dist)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the heads by new ones of `num_classes` outputs, started as timm's: as `nn.Linear` starts.

        num_classes: 0 for none, so that the model returns features [B, embed_dim]. An optimizer made before still
        has the parameters of the old heads.

        Raises:
            ValueError: no such count, or another `global_pool` than "token": the heads read the tokens.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool must be 'token': the heads read the tokens; got {global_pool!r}")
        self.config = replace(self.config, num_classes=num_classes)
        self.head = self._new_head().train(self.training)
        if self.head_dist is not None:
            self.head_dist = self._new_head().train(self.training)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images [B, in_chans, height, width] to tokens [B, R + P, embed_dim] after the last LayerNorm.

        The first R = 1 tokens are the class token's (R = 2: and the distillation token's), then the P
        patches'.

        Raises:
            ValueError: images of another shape.
        """
        return self.norm(self.blocks(self._embed(images)))

    def _embed(self, images: Tensor) -> Tensor:
        size = self.config.input_size
        if images.ndim != 4 or tuple(images.shape[1:]) != size:
            raise ValueError(
                f"this model takes images of shape [batch, {size[0]}, {size[1]}, {size[2]}], got "
                f"{list(images.shape)}; for images of another size build it with create_model(…, img_size=…)"
            )
        reason = parts.unfusable(self.patch_embed, parts.PATCH_EMBEDS)
        if reason is None and guards.patch_embed_unfusable(self.patch_embed) is None:
            return patch_embed_forward(
                self.patch_embed,
                images,
                pos_embed=self.pos_embed,
                cls_token=self.cls_token,
                dist_token=self.dist_token,
            )
        x = self.patch_embed(images)
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.dist_token) if t is not None]
        if self.config.no_embed_class:
            return torch.cat([*prefix, x + self.pos_embed], dim=1)
        return torch.cat([*prefix, x], dim=1) + self.pos_embed

    def forward_head(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens [B, R + P, embed_dim] of `forward_features`, or the first R of them, to logits [B, num_classes].

        A distilled model has two heads: it returns (class logits, distillation logits) in training, as the
        original repository does, and their mean in evaluation.
        """
        logits = self.head(x[:, 0])
        if self.head_dist is None:
            return logits
        dist_logits = self.head_dist(x[:, 1])
        return (logits, dist_logits) if self.training else (logits + dist_logits) / 2

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, in_chans, height, width] to logits, see `forward_head`.

        Raises:
            ValueError: images of another shape.
        """
        x, prefix = self._embed(images), self.config.num_prefix_tokens
        with self._drawn_ahead(x):
            if options.readout_wanted(self) and last_block_unfusable(self.blocks, self.norm) is None:
                *blocks, last = self.blocks
                for block in blocks:
                    x = block(x)
                x = block_forward(last, x, prefix)
            else:
                x = self.blocks(x)
                if last_norm_unfusable(self.norm) is None:
                    # LayerNorm works by rows, and the heads read the prefix rows alone.
                    x = x[:, :prefix].contiguous()
        return self.forward_head(self.norm(x))

    def _drawn_ahead(self, x: Tensor) -> AbstractContextManager:
        if options.compact(self) and self.training and can_draw_ahead(blocks := list(self.blocks)):
            return drawn_ahead(blocks, x)
        return nullcontext()


def init_linear(linear: nn.Linear) -> None:
    """The original repository's: weights normal with σ = 0.02, biases 0."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
