"""Plain PyTorch's DeiT against ours, which is held to timm's."""

import pytest
import torch

from deit_fast.benchmark import plain
from deit_fast.models import DeiTConfig, VisionTransformer


@pytest.mark.parametrize("distilled", [False, True])
def test_images_of_any_shape_and_channels_give_our_logits(distilled):
    config = DeiTConfig(
        embed_dim=64, depth=2, num_heads=1, img_size=(32, 48), in_chans=2, num_classes=5, distilled=distilled
    )
    model = VisionTransformer(config).eval()
    stock = plain.VisionTransformer(config).eval()
    stock.load_state_dict(model.state_dict())
    images = torch.randn(2, 2, 32, 48)
    with torch.inference_mode():
        torch.testing.assert_close(stock(images), model(images), rtol=1e-4, atol=1e-5)
