import copy

import pytest
import timm
import torch
from timm.models import vision_transformer as timm_vit
from torch import nn

from deit_fast import nn as fast
from deit_fast.ops import backend

WIDTH, HEADS = 64, 2


def same_weights(ours: nn.Module, stock: nn.Module) -> None:
    for parameter in stock.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(stock.state_dict())


PAIRS = {
    "layer_norm": (fast.LayerNorm, timm.layers.LayerNorm, {"num_channels": WIDTH}),
    "attention": (fast.Attention, timm.layers.Attention, {"dim": WIDTH, "num_heads": HEADS, "qkv_bias": True}),
    "wide heads": (
        fast.Attention,
        timm.layers.Attention,
        {"dim": WIDTH, "num_heads": 3, "attn_head_dim": 32, "dim_out": 40},
    ),
    "mlp": (fast.Mlp, timm.layers.Mlp, {"in_features": WIDTH, "hidden_features": 96, "out_features": 32}),
    "relu mlp": (fast.Mlp, timm.layers.Mlp, {"in_features": WIDTH, "act_layer": nn.ReLU, "bias": (True, False)}),
    "block": (fast.Block, timm_vit.Block, {"dim": WIDTH, "num_heads": HEADS, "qkv_bias": True}),
    "layer scale block": (fast.Block, timm_vit.Block, {"dim": WIDTH, "num_heads": HEADS, "init_values": 0.1}),
    "wide block": (fast.Block, timm_vit.Block, {"dim": 224, "num_heads": 7, "qkv_bias": True}),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("triton", [False, True])
def test_a_module_computes_what_timms_does(kind, triton):
    ours_type, stock_type, arguments = PAIRS[kind]
    ours, stock = ours_type(**arguments).eval(), stock_type(**arguments).eval()
    same_weights(ours, stock)
    x = torch.randn(2, 17, arguments.get("dim", WIDTH))
    with torch.no_grad(), backend.forced("triton" if triton else None):
        torch.testing.assert_close(ours(x), stock(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["block", "layer scale block"])
def test_training_draws_the_same_drop_path_and_gives_the_same_gradients(kind):
    ours_type, stock_type, arguments = PAIRS[kind]
    ours, stock = ours_type(**arguments, drop_path=0.4), stock_type(**arguments, drop_path=0.4)
    same_weights(ours, stock)
    x = torch.randn(8, 5, WIDTH)
    results = []
    for module in (ours, stock):
        torch.manual_seed(3)
        inputs = x.clone().requires_grad_()
        y = module(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *(p.grad for p in module.parameters()), torch.rand(1)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drop_path_under_autocast_has_the_stock_masks_and_values(dtype):
    arguments = PAIRS["layer scale block"][2] | {"drop_path": 0.3}
    ours, stock = fast.Block(**arguments), timm_vit.Block(**arguments)
    same_weights(ours, stock)
    x = torch.randn(8, 5, WIDTH)
    outputs = []
    for module in (ours, stock):
        torch.manual_seed(3)
        with torch.no_grad(), torch.autocast("cpu", dtype):
            outputs.append(module(x))
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, atol=0.02, rtol=0.02)


def test_a_hook_on_an_inner_module_is_called():
    block = fast.Block(WIDTH, HEADS).eval()
    x, seen = torch.randn(1, 5, WIDTH), []
    with torch.no_grad():
        whole = block(x)
        block.mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        torch.testing.assert_close(block(x), whole, atol=1e-5, rtol=1e-5)
    assert seen == [(1, 5, 4 * WIDTH)]


def test_dropout_in_training_is_not_forgotten():
    block = fast.Block(WIDTH, HEADS, proj_drop=0.5, attn_drop=0.5)
    x = torch.randn(1, 5, WIDTH)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_masks_and_causality_reach_the_attention():
    ours, stock = fast.Block(WIDTH, HEADS).eval(), timm_vit.Block(WIDTH, HEADS).eval()
    same_weights(ours, stock)
    x, mask = torch.randn(1, 5, WIDTH), torch.rand(5, 5) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, attn_mask=mask), stock(x, attn_mask=mask))
        torch.testing.assert_close(ours(x, is_causal=True), stock(x, is_causal=True))


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


def test_a_block_can_be_copied_and_moved():
    block = fast.Block(WIDTH, HEADS).eval()
    x = torch.randn(1, 5, WIDTH)
    twin = copy.deepcopy(block).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(twin(x.bfloat16()).float(), block(x), atol=0.05, rtol=0.05)
