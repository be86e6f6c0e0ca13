import pytest
import torch

from deit_fast.models import create_model, list_models
from deit_fast.models.registry import get_config


def test_names_are_timms():
    timm = pytest.importorskip("timm")
    # Whoever imported `deit_fast.timm` in this process has added ours to them.
    assert list_models() == timm.list_models("deit*", exclude_filters="deit_fast_*")


@pytest.mark.parametrize("name", list_models())
def test_hyper_parameters_are_timms(name):
    timm = pytest.importorskip("timm")
    ours, theirs = create_model(name, device="meta"), timm.create_model(name, device="meta")
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    config = get_config(name)
    assert theirs.blocks[0].attn.num_heads == config.num_heads
    assert theirs.norm.eps == theirs.blocks[0].norm1.eps == config.layer_norm_eps
    assert theirs.patch_embed.img_size == (config.img_size, config.img_size)
    assert getattr(theirs.blocks[0].ls1, "init_values", None) == config.init_values


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("deit_tinny_patch16_224", "deit_tiny_patch16_224"),
        ("deit-small-distilled-patch16-224", "deit_small_distilled_patch16_224"),
        ("deit3_huge_patch16_224", "deit3_huge_patch14_224"),
        ("resnet50", "Known: deit3_base_patch16_224, "),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*{nearest}"):
        create_model(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 225}, "multiple of the patch size"),
        ({"num_classes": -1}, "num_classes"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"dtype": torch.int8}, "dtype must be floating-point, got torch.int8"),
    ],
)
def test_a_bad_argument_is_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("deit_tiny_patch16_224", **arguments)


def test_arguments_reach_the_model():
    model = create_model("deit_tiny_patch16_224", num_classes=10, img_size=64, drop_path_rate=0.1, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.pos_embed.shape == (1, 1 + 16, 192)
    assert model(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16)).shape == (1, 10)


@pytest.mark.parametrize("img_size", [(64, 96), (96, 64)])
def test_images_of_any_shape_reach_the_model(img_size):
    model = create_model("deit_tiny_patch16_224", num_classes=10, img_size=img_size, in_chans=2).eval()
    assert model.pos_embed.shape == (1, 1 + 24, 192)
    assert model(torch.randn(1, 2, *img_size)).shape == (1, 10)
    with pytest.raises(ValueError, match=rf"\[batch, 2, {img_size[0]}, {img_size[1]}\], got \[1, 2, 80, 80\]"):
        model(torch.randn(1, 2, 80, 80))


def test_a_model_made_on_the_meta_device_takes_weights_later():
    torch.manual_seed(0)
    source = create_model("deit_tiny_distilled_patch16_224", img_size=32).eval()
    model = create_model("deit_tiny_distilled_patch16_224", img_size=32, device="meta").eval()
    model.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=True)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), source(images))
