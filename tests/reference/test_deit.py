import pytest
import torch

from reference import deit, deit_features

timm = pytest.importorskip("timm")


def make_timm_model(name, **kwargs):
    torch.manual_seed(0)
    stock = timm.create_model(name, depth=2, img_size=32, num_classes=10, **kwargs).double().eval()
    for parameter in stock.parameters():  # LayerScale starts at 1e-6: too small to see a wrong branch behind it
        torch.nn.init.normal_(parameter, std=0.1)
    return stock


@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"]
)
def test_deit_is_timms(name):
    stock = make_timm_model(name)
    num_heads = stock.blocks[0].attn.num_heads
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(deit_features(images, stock.state_dict(), num_heads), stock.forward_features(images))
    torch.testing.assert_close(deit(images, stock.state_dict(), num_heads), stock(images))


def test_training_draws_the_drop_path_masks_of_timm_and_returns_both_heads():
    stock = make_timm_model("deit_tiny_distilled_patch16_224", drop_path_rate=0.5).train()
    stock.set_distilled_training(True)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    expected = stock(images)
    torch.manual_seed(1)
    logits = deit(images, stock.state_dict(), 3, drop_path_rates=[0.0, 0.5], training=True)
    torch.testing.assert_close(logits, expected)
