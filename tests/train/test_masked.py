"""Masked image modelling: the loss is transformers', and the masks are whole squares of the share asked for."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from deit_fast.models.key_maps import to_transformers_names
from deit_fast.train import build, recipe
from deit_fast.train.masked import MaskedImages

SMALL = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


def encoder(name: str = "deit_tiny_distilled_patch16_224"):
    return timm.create_model(name, **SMALL)


@pytest.mark.parametrize("swapped", [False, True])
def test_the_loss_and_its_gradients_are_those_of_transformers(tmp_path, swapped):
    transformers = pytest.importorskip("transformers")
    made = MaskedImages(encoder(), 0.6, 8)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = transformers.DeiTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        encoder_stride=4,
        layer_norm_eps=1e-6,
    )
    weights = to_transformers_names(made.encoder.state_dict()) | {"deit.embeddings.mask_token": made.mask_token.data}
    weights |= {f"decoder.{name}": tensor for name, tensor in made.decoder.state_dict().items()}
    config.save_pretrained(tmp_path)
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.DeiTForMaskedImageModeling.from_pretrained(tmp_path).train()
    begun = build.weights_of(recipe.load("finetune", finetune=str(tmp_path)))
    assert begun.keys() == made.encoder.state_dict().keys()
    if swapped:
        assert build.swap_known(made.encoder)
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    losses = made(images)
    torch.manual_seed(1)
    masks = made.masks(3)
    expected = theirs(images, bool_masked_pos=masks.flatten(1)).loss
    assert losses.shape == (3,)
    torch.testing.assert_close(losses.mean(), expected, rtol=1e-5, atol=0)
    losses.mean().backward()
    expected.backward()
    for mine, other in (
        (made.mask_token, theirs.deit.embeddings.mask_token),
        (made.encoder.pos_embed, theirs.deit.embeddings.position_embeddings),
        (made.decoder[0].weight, theirs.decoder[0].weight),
    ):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_tokens_and_positions_do_not_decay():
    made = MaskedImages(encoder(), 0.6, 8)
    groups = build.optimizer_of(recipe.load("pretrain"), made, 1).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in made.named_parameters() if id(parameter) in decayed}
    assert names and all(name.endswith(".weight") for name in names)


def test_whole_squares_are_masked_and_their_share_is_the_ratio():
    masks = MaskedImages(encoder(), 0.3, 8).masks(20)
    squares = masks.view(20, 4, 2, 4, 2).transpose(2, 3)
    assert torch.equal(squares.any(-1).any(-1), squares.all(-1).all(-1))
    assert squares[..., 0, 0].sum((1, 2)).eq(5).all()  # ceil(0.3 * 16)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10


def test_what_is_masked_is_not_seen():
    made = MaskedImages(encoder("deit_tiny_patch16_224"), 0.5, 8).eval()
    images, masks = torch.randn(1, 3, 32, 32), made.masks(1)
    pixels = masks.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    others = torch.where(pixels, torch.randn_like(images), images)
    assert torch.equal(made.filled(images, masks), made.filled(others, masks))


@pytest.mark.parametrize("mask_patch_size", [6, 2, 24])
def test_squares_that_do_not_divide_are_refused(mask_patch_size):
    with pytest.raises(ValueError, match="must divide the image's 32 x 32 pixels"):
        MaskedImages(encoder(), 0.6, mask_patch_size)


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="needs a ViT, got"):
        MaskedImages(timm.create_model("test_resnet", num_classes=0), 0.6, 32)
