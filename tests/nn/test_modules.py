import pytest
import timm
import torch
from timm.models import vision_transformer as timm_vit
from torch import nn

from deit_fast import nn as fast
from deit_fast.ops import backend
from tests.nn.helpers import HEADS, PAIRS, WIDTH, same_weights


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("triton", [False, True])
def test_a_module_computes_what_timms_does(kind, triton):
    ours_type, stock_type, arguments = PAIRS[kind]
    ours, stock = ours_type(**arguments).eval(), stock_type(**arguments).eval()
    same_weights(ours, stock)
    x = torch.randn(2, 17, arguments.get("dim", WIDTH))
    with torch.no_grad(), backend.forced("triton" if triton else None):
        torch.testing.assert_close(ours(x), stock(x), atol=2e-5, rtol=1e-4)


def test_the_modules_build_timms_vision_transformer():
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": HEADS, "num_classes": 7}
    ours = timm_vit.VisionTransformer(
        **arguments,
        block_fn=fast.Block,
        attn_layer=fast.Attention,
        mlp_layer=fast.Mlp,
        norm_layer=fast.LayerNorm,
        embed_layer=fast.PatchEmbed,
    ).eval()
    stock = timm_vit.VisionTransformer(**arguments).eval()
    same_weights(ours, stock)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), stock(images), atol=1e-5, rtol=1e-5)
        dynamic = {"dynamic_img_size": True}
        ours, stock = (
            timm_vit.VisionTransformer(**arguments, **dynamic, embed_layer=layer).eval()
            for layer in (fast.PatchEmbed, timm.layers.PatchEmbed)
        )
        same_weights(ours, stock)
        images = torch.randn(2, 3, 40, 24)
        torch.testing.assert_close(ours(images), stock(images), atol=1e-5, rtol=1e-5)
    ours.set_input_size(img_size=48)
    assert ours.patch_embed.num_patches == 36


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: fast.Attention(64, num_heads=3), "num_heads must divide dim, got dim=64 and num_heads=3"),
        (lambda: fast.Block(64, 2, qk_norm=True), "does not compute qk_norm=True"),
        (lambda: fast.Attention(64, gated=True), "does not compute gated=True"),
        (lambda: fast.Mlp(64, norm_layer=nn.LayerNorm), "does not compute a norm of the hidden layer"),
        (lambda: fast.PatchEmbed(output_fmt="NCL"), "one of NCHW, NHWC, NLC, got 'NCL'"),
        (lambda: fast.PatchEmbed(32)(torch.ones(1, 3, 32, 48)), r"takes images of \(32, 32\) pixels .* got \(32, 48\)"),
        (lambda: fast.PatchEmbed(32).set_input_size(patch_size=8), "keeps its patch size"),
    ],
)
def test_what_can_not_be_computed_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
