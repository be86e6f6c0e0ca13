import pytest
import timm
import torch
from torch import nn

from deit_fast import nn as fast
from tests.nn.helpers import WIDTH, same_weights


@pytest.mark.parametrize(
    ("layout", "arguments"),
    [
        ("tokens", {}),
        ("grid", {"flatten": False}),
        ("NHWC", {"output_fmt": "NHWC"}),
        ("padded", {"dynamic_img_pad": True, "strict_img_size": False}),
        ("norm", {"norm_layer": nn.LayerNorm, "bias": False}),
    ],
)
def test_patch_embed_in_every_layout(layout, arguments):
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, **arguments}
    ours, stock = fast.PatchEmbed(**arguments), timm.layers.PatchEmbed(**arguments)
    same_weights(ours, stock)
    images = torch.randn(2, 3, 30, 27) if layout == "padded" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), stock(images), atol=1e-5, rtol=1e-5)
    for attribute in ("img_size", "patch_size", "grid_size", "num_patches"):
        assert getattr(ours, attribute) == getattr(stock, attribute)
    assert ours.dynamic_feat_size((30, 27)) == stock.dynamic_feat_size((30, 27))
    assert ours.feat_ratio() == stock.feat_ratio()
