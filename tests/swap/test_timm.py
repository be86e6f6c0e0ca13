"""timm's DeiT, DeiT III and ViT models, stock and swapped."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deit_fast.swap import restore, swap
from tests.swap.helpers import (
    LoraLinear,
    assert_close,
    assert_same_gradients,
    block_calls,
    gradients,
    operator_calls,
    randomise,
)

timm = pytest.importorskip("timm")
from timm.layers import Attention, DropPath, Mlp, PatchEmbed  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402


def vit(name: str = "deit_tiny_distilled_patch16_224", **kwargs) -> nn.Module:
    """A small one: two blocks, 32 pixels, ten classes."""
    kwargs = {"depth": 2, "img_size": 32, "num_classes": 10} | kwargs
    return randomise(timm.create_model(name, **kwargs)).eval()


def small(**kwargs) -> nn.Module:
    kwargs = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 10} | kwargs
    return randomise(VisionTransformer(**kwargs)).eval()


def images(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def assert_swap_is_exact(model: nn.Module, x: torch.Tensor) -> None:
    """Stock, swapped and restored agree; swapped uses the operators and leaves parameters and keys alone."""
    classes = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert not report.kept
        assert_close(model(x), stock)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    calls = operator_calls(lambda: model(x))
    whole = sum(reason is not None for reason in report.readout.values())
    assert calls["patch_embed"] == 1 and calls["attention"] == len(model.blocks) - 1 + whole
    assert calls["readout_attention"] == 1 - whole
    assert calls["layer_norm"] == 1, "a norm inside a block ran by itself"
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.inference_mode():
        assert torch.equal(model(x), stock)


@pytest.mark.parametrize("name", timm.list_models(["deit*"]))
def test_every_deit_agrees_at_its_own_size(name: str) -> None:
    model = randomise(timm.create_model(name, depth=2)).eval()
    assert_swap_is_exact(model, images(1, model.default_cfg["input_size"][-1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_token": False, "global_pool": "avg"},
        {"no_embed_class": True, "init_values": 0.5},
        {"qkv_bias": False, "proj_bias": False},
        {"pos_embed": "none"},
        {"act_layer": lambda: nn.GELU(approximate="tanh")},
        {"img_size": (32, 48)},
        {"norm_layer": nn.LayerNorm},
        {"final_norm": True, "fc_norm": True, "global_pool": "avg"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_plain_vits_of_the_same_blocks_agree(options: dict) -> None:
    model = small(**options)
    x = torch.randn(2, 3, *model.patch_embed.img_size)
    assert_swap_is_exact(model, x)


def test_a_swapped_model_runs_whole_blocks() -> None:
    model = vit()
    swap(model)
    assert operator_calls(lambda: model(images())) == block_calls(2)


def test_the_kernels_give_stocks_answer(triton_backend) -> None:
    model, x = small(depth=1, init_values=0.5), images(1)
    with torch.inference_mode():
        stock = model(x)
        swap(model)
        assert_close(model(x), stock)


def test_bfloat16_and_autocast_agree() -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        stock_autocast = torch.autocast("cpu", torch.bfloat16)(model)(x)
        swap(model)
        assert_close(torch.autocast("cpu", torch.bfloat16)(model)(x), stock_autocast)
        model.bfloat16()
        swapped = model(x.bfloat16())
        restore(model)
        assert_close(swapped, model(x.bfloat16()))


def test_training_gives_stock_outputs_and_gradients() -> None:
    model, x = vit(drop_path_rate=0.4).train(), images(8)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        out = model(x)
        results.append((out, gradients(model, out.square().sum())))
        swap(model)
    assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model, x = vit().train(), images()
    expected = gradients(model, model(x).square().sum())
    swap(model)
    model.set_grad_checkpointing(True)
    assert_same_gradients(gradients(model, model(x).square().sum()), expected)


def test_distilled_training_returns_both_heads() -> None:
    model, x = vit().train(), images()
    model.set_distilled_training(True)
    stock = model(x)
    swap(model)
    for result, expected in zip(model(x), stock, strict=True):
        assert_close(result, expected)


# Copies, pickles, modes -------------------------------------------------------------------------------------------


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [pickled, saved])
def test_what_leaves_the_process_is_the_stock_model(duplicate) -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        stock = model(x)
        classes = [type(module) for module in model.modules()]
        swap(model)
        model(x)
        twin = duplicate(model)
        assert torch.equal(twin(x), stock)
    assert [type(module) for module in twin.modules()] == classes
    assert not any(name.startswith("_deit_fast") for module in twin.modules() for name in module.__dict__)


def test_a_copy_of_a_swapped_model_is_swapped_and_can_be_restored() -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        stock = model(x)
        swap(model)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), model(x))
        assert operator_calls(lambda: twin(x)) == block_calls(2)
        restore(twin)
        assert torch.equal(twin(x), stock)
    assert type(twin.blocks[0]) is Block
    assert type(model.blocks[0]) is not Block, "restoring the copy restored the original"


def test_modes_and_dtypes_change_while_swapped() -> None:
    model, x = vit(proj_drop_rate=0.3), images()
    swap(model)
    assert operator_calls(lambda: model(x)) == block_calls(2)
    model.train()
    # Dropout is active: the attention and MLP of a block can't run on the operators either, its norms can.
    assert operator_calls(lambda: model(x)) == {"patch_embed": 1, "layer_norm": 5}
    model.eval().double()
    assert model(x.double()).dtype is torch.float64
    assert operator_calls(lambda: model(x.double())) == block_calls(2)


def test_weights_loaded_into_a_swapped_meta_model_are_used() -> None:
    model, x = vit(), images()
    with torch.device("meta"):
        empty = timm.create_model("deit_tiny_distilled_patch16_224", depth=2, img_size=32, num_classes=10).eval()
    assert not swap(empty).kept
    empty.load_state_dict(model.state_dict(), assign=True)
    with torch.inference_mode():
        assert_close(empty(x), model(x))


def test_exponential_moving_average_of_a_swapped_model_runs_on_the_operators() -> None:
    model, x = vit(), images()
    swap(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    average.eval()
    assert operator_calls(lambda: average(x)) == block_calls(2)
    assert_close(average(x), model(x))


# What makes a block step aside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["norm1", "attn", "attn.qkv", "attn.attn_drop", "drop_path1", "mlp.act", "mlp.fc2"])
def test_hooks_on_inner_modules_fire_and_can_change_the_result(inner: str) -> None:
    model, x = vit(), images()
    swap(model)
    expected = model(x)
    seen = []
    handle = model.blocks[0].get_submodule(inner).register_forward_hook(lambda *_: seen.append(inner))
    assert_close(model(x), expected)
    # The fused attention of stock never calls its dropout.
    assert len(seen) == (inner != "attn.attn_drop")
    handle.remove()
    assert operator_calls(lambda: model(x)) == block_calls(2)


def test_attention_weights_are_read_through_a_hook_as_in_stock() -> None:
    model, x = vit(), images()
    for block in model.blocks:
        block.attn.fused_attn = False
    weights = []
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda *args: weights.append(args[-1]))
    model(x)
    swap(model)
    model(x)
    assert_close(weights[1], weights[0])


def test_a_backward_hook_on_an_inner_module_fires() -> None:
    model, x = vit(), images()
    swap(model)
    seen = []
    model.blocks[0].mlp.register_full_backward_hook(lambda *_: seen.append(1))
    model(x).sum().backward()
    assert seen == [1]


def test_hooks_on_every_module_fire_as_often_as_in_stock() -> None:
    model, x = vit(), images()
    counts = []
    for _ in range(2):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda module, *_, seen=seen: seen.append(module))
        model(x)
        handle.remove()
        counts.append(len(seen))
        swap(model)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("place", ["patch_embed", "patch_embed.proj", "pos_drop", "norm_pre"])
def test_a_hook_in_the_embedding_fires(place: str) -> None:
    model, x = vit(), images()
    swap(model)
    expected = model(x)
    seen = []
    model.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
    assert_close(model(x), expected)
    assert seen == [place]


@pytest.mark.parametrize("mask", ["attn_mask", "is_causal"])
def test_masked_attention_is_stocks(mask: str) -> None:
    model, x = vit(), images()
    tokens = model.pos_embed.shape[1]
    kwargs = {"is_causal": True} if mask == "is_causal" else {"attn_mask": torch.rand(tokens, tokens) > 0.3}
    with torch.inference_mode():
        stock, unmasked = model(x, **kwargs), model(x)
        swap(model)
        assert_close(model(x, **kwargs), stock)
    assert not torch.allclose(stock, unmasked, atol=1e-3)


def test_a_lora_linear_is_computed_and_the_other_parts_stay_on_the_operators() -> None:
    model, x = vit(), images()
    model.blocks[0].attn.qkv = LoraLinear(model.blocks[0].attn.qkv)
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert report.kept == {
        "blocks.0": "attn: qkv is a tests.swap.helpers.LoraLinear",
        "blocks.0.attn": "qkv is a tests.swap.helpers.LoraLinear",
    }
    assert operator_calls(lambda: model(x)) == block_calls(1, layer_norm=3, linear=2)


def test_a_lora_linear_put_in_after_the_swap_is_computed() -> None:
    model, x = vit(), images()
    swap(model)
    before = model(x)
    model.blocks[1].mlp.fc1 = LoraLinear(model.blocks[1].mlp.fc1)
    swapped = model(x)
    restore(model)
    assert_close(swapped, model(x))
    assert not torch.allclose(swapped, before, atol=1e-3)


class Quantized(torch.Tensor):
    """A tensor subclass, as quantization libraries put in a weight's place."""

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(tensors, context, size, stride):
        return Quantized(tensors["values"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values)
        plain = torch.utils._pytree.tree_map(lambda a: a.values if isinstance(a, Quantized) else a, args)
        return function(*plain, **(kwargs or {}))


def test_a_weight_that_is_a_tensor_subclass_is_left_to_stock() -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        expected = model(x)
    proj = model.blocks[0].attn.proj
    proj.weight = nn.Parameter(Quantized(proj.weight.detach()), requires_grad=False)
    report = swap(model)
    assert report.kept["blocks.0.attn"] == "proj has a tensor subclass for a parameter"
    with torch.inference_mode():
        assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": True}, "attn: normalizes queries and keys"),
        ({"act_layer": nn.ReLU}, "mlp: its activation is ReLU, not GELU"),
        ({"scale_mlp_norm": True}, "mlp: normalizes the hidden layer"),
    ],
)
def test_a_block_with_another_part_is_kept_and_its_norms_are_swapped(options: dict, reason: str) -> None:
    model, x = small(**options), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert report.kept["blocks.0"] == report.kept["blocks.1"] == reason
    assert "blocks.0.norm1" in report.swapped
    assert operator_calls(lambda: model(x))["layer_norm"] >= 5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dynamic_img_size": True}, "patch_embed: gives a grid of patches, not a sequence"),
        ({"dynamic_img_pad": True}, "patch_embed: pads its images"),
        ({"reg_tokens": 2}, "has register tokens"),
        ({"pre_norm": True}, "norm_pre is in the way (LayerNorm)"),
        ({"embed_norm_layer": nn.LayerNorm}, "patch_embed: normalizes the patches"),
    ],
)
def test_an_embedding_that_the_operator_does_not_compute_is_left_to_stock(options: dict, reason: str) -> None:
    model, x = small(**options), images()
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert_close(model(x), stock)
    assert report.kept[""] == reason
    assert "blocks.0" in report.swapped


def test_images_of_another_size_get_stocks_error() -> None:
    model = vit()
    swap(model)
    with pytest.raises(AssertionError, match=r"Input height \(48\) doesn't match model \(32\)"):
        model(images(1, 48))


def test_set_input_size_works_while_swapped() -> None:
    model = vit()
    swap(model)
    model.set_input_size(img_size=48)
    x = images(1, 48)
    assert operator_calls(lambda: model(x)) == block_calls(2)
    swapped = model(x)
    restore(model)
    assert_close(swapped, model(x))


def test_intermediate_features_agree() -> None:
    model, x = vit(), images()
    with torch.inference_mode():
        stock = model.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
        swap(model)
        for result, expected in zip(
            model.forward_intermediates(x, indices=[0, 1], intermediates_only=True), stock, strict=True
        ):
            assert_close(result, expected)


# Parts on their own, and compilers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["alone", "in a list"])
def test_parts_are_swapped_outside_of_a_vision_transformer(wrap: str) -> None:
    parts = [Block(64, 2), Attention(64, num_heads=2), Mlp(64, 128)]
    for part in parts:
        module = randomise(part if wrap == "alone" else nn.Sequential(part)).eval()
        x = torch.randn(2, 5, 64)
        stock = module(x)
        assert swap(module).swapped
        assert_close(module(x), stock)
        assert operator_calls(lambda module=module, x=x: module(x))


def test_a_patch_embedding_without_a_fixed_size_is_swapped() -> None:
    patches = randomise(PatchEmbed(img_size=None, patch_size=8, embed_dim=64))
    x = torch.randn(2, 3, 24, 40)
    stock = patches(x)
    swap(patches)
    assert_close(patches(x), stock)
    assert operator_calls(lambda: patches(x)) == {"patch_embed": 1}
    # Stock drops the pixels that fill no patch.
    assert patches(torch.randn(2, 3, 27, 40)).shape == (2, 15, 64)


def test_restoring_one_part_makes_its_block_step_aside() -> None:
    model, x = vit(), images()
    swap(model)
    restore(model.blocks[0].attn)
    assert type(model.blocks[0].attn) is Attention
    assert operator_calls(lambda: model(x)) == block_calls(1, layer_norm=3, linear=2)


def test_a_swapped_model_compiles_whole_and_compiled_models_can_be_swapped() -> None:
    model, x = vit(), images()
    with torch.no_grad():
        stock = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), stock)
        assert len(swap(compiled).swapped) == 13
        assert_close(compiled(x), stock)
        assert type(model.blocks[0]) is not Block
        restore(compiled)
        assert torch.equal(model(x), stock)
        assert_close(compiled(x), stock)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_scripted_and_traced_models_are_stock() -> None:
    model, x = vit(depth=1), images()
    with torch.no_grad():
        stock = model(x)
        swap(model)
        for program in (torch.jit.script(model), torch.jit.trace(model, x)):
            assert "deit_fast::" not in str(program.inlined_graph)
            assert_close(program(x), stock)
    assert type(model.blocks[0]) is not Block


def test_torch_fx_traces_the_stock_model() -> None:
    model, tokens = vit(depth=1), torch.randn(2, 6, 192)
    swap(model)
    program = torch.fx.symbolic_trace(model.blocks)
    assert "deit_fast" not in program.code
    assert_close(program(tokens), model.blocks(tokens))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_transforms_agree() -> None:
    model, x = vit(depth=1), images()
    swap(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, image.unsqueeze(0)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    restore(model)
    expected = gradients(model, model(x).square().sum())
    assert_same_gradients({name: g.sum(0) for name, g in per_sample.items()}, expected)


def test_optimizer_steps_follow_stock() -> None:
    x, labels = images(4), torch.arange(4)
    losses = []
    for swapped in (False, True):
        model = vit("deit3_small_patch16_224", depth=1).train()
        if swapped:
            swap(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        for _ in range(3):
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_drop_path_draws_the_masks_of_stock() -> None:
    block = randomise(Block(64, 2, drop_path=0.5)).train()
    assert isinstance(block.drop_path1, DropPath)
    x = torch.randn(16, 5, 64)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(block(x))
        swap(block)
    assert_close(results[1], results[0])


def test_another_librarys_class_around_a_swapped_model_is_kept_by_restore() -> None:
    """As token-merging libraries patch: a class made of the model's own, with a forward that calls it."""
    model, x = vit(), images()
    stock = copy.deepcopy(model)
    swap(model)

    def patch(each: nn.Module) -> None:
        class Doubling(each.__class__):
            def forward(self, *args, **kwargs):
                return 2 * super().forward(*args, **kwargs)

        each.__class__ = Doubling

    patch(model)
    patch(stock)
    doubling = type(model)
    with torch.inference_mode():
        assert_close(model(x), stock(x))
        restore(model)
        assert type(model) is doubling
        assert torch.equal(model(x), stock(x))
        assert operator_calls(lambda: model(x)) == {}
        swap(model)
        assert operator_calls(lambda: model(x))["attention"] > 0
        assert_close(model(x), stock(x))


def test_timms_feature_extraction_traces_models_of_any_image_size() -> None:
    from timm.models._features_fx import create_feature_extractor

    options = {"img_size": 32, "depth": 2, "num_classes": 10}
    model = randomise(timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **options)).eval()
    x = images()
    stock = copy.deepcopy(model)
    swap(model)
    with torch.no_grad():
        ours, theirs = (create_feature_extractor(each, ["blocks.0", "norm"])(x) for each in (model, stock))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert_close(ours[name], theirs[name])
