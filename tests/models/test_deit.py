import copy
import pickle

import pytest
import torch

import reference
from deit_fast.models import VisionTransformer, create_model, list_models


@pytest.mark.parametrize("name", list_models())
def test_logits_are_timms(name, small_config, timm_model, images):
    config, stock = small_config(name), timm_model(name)
    model = VisionTransformer(config, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    images = images[..., : config.img_size, : config.img_size]
    with torch.inference_mode():
        expected = stock(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_float64_logits_are_the_references(name, small_config, images):
    torch.manual_seed(0)
    config = small_config(name)
    model = VisionTransformer(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    expected = reference.deit(images.double(), model.state_dict(), config.num_heads, config.layer_norm_eps)
    torch.testing.assert_close(model(images.double()), expected, rtol=1e-9, atol=1e-9)


def test_a_model_of_full_depth_and_size_is_timms():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    stock = timm.create_model("deit_tiny_distilled_patch16_224").eval()
    model = create_model("deit_tiny_distilled_patch16_224").eval()
    model.load_state_dict(stock.state_dict(), strict=True)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), stock(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.forward_features(images), stock.forward_features(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_gradients_and_drop_path_are_timms(name, small_config, timm_model, images):
    stock = timm_model(name, drop_path_rate=0.5).train()
    if "distilled" in name:
        stock.set_distilled_training(True)
    model = VisionTransformer(small_config(name), drop_path_rate=0.5).train()
    model.load_state_dict(stock.state_dict(), strict=True)
    outputs = []
    for each in (stock, model):
        torch.manual_seed(2)
        output = each(images.repeat(4, 1, 1, 1))
        torch.cat(output).square().mean().backward() if isinstance(output, tuple) else output.square().mean().backward()
        outputs.append(output)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    stock_gradients = dict(stock.named_parameters())
    for key, parameter in model.named_parameters():
        expected = stock_gradients[key].grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-3, atol=1e-4 * scale + 1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_a_distilled_model_has_two_heads_in_training_and_their_mean_in_evaluation(small_config, images):
    torch.manual_seed(0)
    model = VisionTransformer(small_config("deit_tiny_distilled_patch16_224"))
    logits, dist_logits = model.train()(images)
    assert logits.shape == dist_logits.shape == (2, 10)
    torch.testing.assert_close(model.eval()(images), (logits + dist_logits) / 2)


def test_without_classes_the_model_returns_features(small_config, images):
    model = VisionTransformer(small_config("deit_tiny_patch16_224", num_classes=0)).eval()
    torch.testing.assert_close(model(images), model.forward_features(images)[:, 0])


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("classes", [5, 0])
def test_the_classifier_is_reset_as_timms(name, classes, small_config, timm_model, images):
    stock = timm_model(name)
    model = VisionTransformer(small_config(name), dtype=torch.float32).eval()
    model.load_state_dict(stock.state_dict())
    for each in (model, stock):
        torch.manual_seed(0)
        each.reset_classifier(classes)
    heads, theirs = model.get_classifier(), stock.get_classifier()
    assert isinstance(heads, tuple) is isinstance(theirs, tuple) is ("distilled" in name)
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert not head.training
    assert {k: v.sum() for k, v in model.state_dict().items()} == {k: v.sum() for k, v in stock.state_dict().items()}
    assert model.config.num_classes == classes
    with torch.inference_mode():
        torch.testing.assert_close(model(images), stock(images), rtol=1e-4, atol=1e-4)


def test_new_classifiers_have_the_models_mode_and_dtype(small_config):
    model = VisionTransformer(small_config("deit_tiny_distilled_patch16_224"), dtype=torch.bfloat16).train()
    model.reset_classifier(5, "token")
    assert all(head.training and head.weight.dtype == torch.bfloat16 for head in model.get_classifier())
    with pytest.raises(ValueError, match=r"global_pool must be 'token'.*got 'avg'"):
        model.reset_classifier(5, "avg")
    with pytest.raises(ValueError, match="num_classes must be an integer and at least 0, got -1"):
        model.reset_classifier(-1)
    assert model.head.out_features == 5


def test_a_last_norm_that_mixes_tokens_sees_every_token(small_config, images):
    torch.manual_seed(0)
    model = VisionTransformer(small_config("deit_tiny_patch16_224")).train()
    model.norm = torch.nn.BatchNorm1d(1 + 16)
    expected = model.forward_head(model.forward_features(images))
    torch.testing.assert_close(model(images), expected)


def test_initial_weights_follow_the_original_recipe():
    torch.manual_seed(0)
    model = create_model("deit3_small_patch16_224")
    for key in (
        "cls_token",
        "pos_embed",
        "blocks.3.attn.qkv.weight",
        "blocks.11.mlp.fc2.weight",
        "head.weight",
    ):
        assert model.get_parameter(key).std().item() == pytest.approx(0.02, rel=0.1), key
    for key, parameter in model.named_parameters():
        if key.endswith("bias") and "patch_embed" not in key:
            assert not parameter.any(), key
        if "norm" in key and key.endswith("weight"):
            assert (parameter == 1).all(), key
        if key.endswith("gamma"):
            assert (parameter == 1e-6).all(), key


@pytest.mark.parametrize(
    "shape",
    [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 80), (1, 3, 224, 224), (1, 64, 64, 3), (1, 3, 64, 64, 1)],
)
def test_an_image_of_another_shape_is_one_clear_error(shape, small_config):
    model = VisionTransformer(small_config("deit_tiny_patch16_224"))
    with pytest.raises(ValueError, match=r"takes images of shape \[batch, 3, 64, 64\], got \["):
        model(torch.zeros(shape))


def test_an_empty_batch_gives_no_logits(small_config):
    model = VisionTransformer(small_config("deit_tiny_patch16_224")).eval()
    assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 10)


def test_deepcopy_and_pickle_keep_the_logits(small_config, images):
    torch.manual_seed(0)
    model = VisionTransformer(small_config("deit3_small_patch16_224")).eval()
    expected = model(images)
    assert torch.equal(copy.deepcopy(model)(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
@pytest.mark.parametrize("inner", ["patch_embed", "patch_embed.proj", "blocks.0.attn.qkv", "norm", "head"])
def test_a_hook_on_any_module_runs_and_can_change_the_output(name, inner, small_config, images):
    torch.manual_seed(0)
    model = VisionTransformer(small_config(name, init_values=0.5 if "deit3" in name else None)).eval()
    expected = model(images)
    module = model.get_submodule(inner)
    outputs = []
    handle = module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-6)
    assert len(outputs) == 1
    handle.remove()
    module.register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    assert not torch.equal(model(images), expected)
