"""transformers' DeiT and ViT classes, stock and swapped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from deit_fast.swap import restore, swap
from tests.swap.helpers import (
    LoraLinear,
    assert_close,
    assert_same_gradients,
    gradients,
    operator_calls,
    randomise,
)

transformers = pytest.importorskip("transformers")
from transformers.models.deit import modeling_deit  # noqa: E402

CLASSES = [
    "DeiTModel",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "DeiTForMaskedImageModeling",
    "ViTModel",
    "ViTForImageClassification",
    "ViTForMaskedImageModeling",
]
LAYER = {"layer_norm_qkv": 1, "attention_qkv": 1, "linear_residual": 1, "mlp": 1}
LAYERS = 2


def build(class_name: str = "DeiTForImageClassification", attention: str = "sdpa", **options) -> nn.Module:
    """A small one: two layers of width 64, 32 pixels, patches of 8."""
    config_class = transformers.ViTConfig if class_name.startswith("ViT") else transformers.DeiTConfig
    options = {
        "hidden_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 32,
        "patch_size": 8,
        "encoder_stride": 8,
        "num_labels": 10,
    } | options
    config = config_class(**options)
    config._attn_implementation = attention
    return randomise(getattr(transformers, class_name)(config)).eval()


def pixels(batch: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def layer_calls(layers: int = LAYERS, *, readout: bool = True, **others: int) -> dict[str, int]:
    """What a classifier calls without gradients; with `readout` its last layer for the rows that are read alone."""
    calls = {op: layers * n for op, n in LAYER.items()}
    if readout:
        calls |= {"layer_norm_qkv": layers - 1, "attention_qkv": layers - 1, "readout_attention_qkv": 1}
    calls |= {"patch_embed": 1, "layer_norm": 1} | others
    return {op: count for op, count in calls.items() if count}


def assert_outputs_close(result, expected) -> None:
    assert result.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, tuple):
            assert len(result[key]) == len(value)
            for ours, stock in zip(result[key], value, strict=True):
                assert_close(ours, stock)
        else:
            assert_close(result[key], value)


@pytest.mark.parametrize("class_name", CLASSES)
def test_every_class_agrees_and_is_restored_bitwise(class_name: str) -> None:
    model, x = build(class_name), pixels()
    classes = [type(module) for module in model.modules()]
    parameters = list(model.parameters())
    state = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        stock = model(x)
        report = swap(model)
        assert not report.kept
        assert_outputs_close(model(x), stock)
    assert operator_calls(lambda: model(x)) == layer_calls(readout="ForImageClassification" in class_name)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    restore(model)
    assert [type(module) for module in model.modules()] == classes
    with torch.inference_mode():
        assert all(torch.equal(model(x)[key], stock[key]) for key in stock)


def test_the_kernels_give_stocks_answer(triton_backend) -> None:
    model, x = build(), pixels(1)
    with torch.inference_mode():
        stock = model(x).logits
        swap(model)
        assert_close(model(x).logits, stock)


def test_bfloat16_and_autocast_agree() -> None:
    model, x = build(), pixels()
    with torch.inference_mode():
        stock_autocast = torch.autocast("cpu", torch.bfloat16)(model)(x).logits
        swap(model)
        assert_close(torch.autocast("cpu", torch.bfloat16)(model)(x).logits, stock_autocast)
        model.bfloat16()
        swapped = model(x).logits
        restore(model)
        assert_close(swapped, model(x).logits)


@pytest.mark.parametrize("class_name", ["DeiTForMaskedImageModeling", "ViTForMaskedImageModeling"])
def test_masked_patches_become_the_mask_token(class_name: str) -> None:
    model, x = build(class_name), pixels()
    mask = torch.rand(2, 16) > 0.5
    with torch.inference_mode():
        stock = model(x, bool_masked_pos=mask)
        swap(model)
        assert_outputs_close(model(x, bool_masked_pos=mask), stock)
        # A mask that is no bool may hold fractions: stock blends.
        fractions = torch.rand(2, 16)
        embeddings = model.base_model.embeddings
        blended = embeddings(x, bool_masked_pos=fractions)
        restore(model)
        assert_close(blended, embeddings(x, bool_masked_pos=fractions))


@pytest.mark.parametrize("class_name", ["DeiTModel", "ViTModel"])
def test_positions_are_interpolated_as_in_stock(class_name: str) -> None:
    model, x = build(class_name), pixels(size=48)
    with torch.inference_mode():
        stock = model(x, interpolate_pos_encoding=True)
        swap(model)
        assert_outputs_close(model(x, interpolate_pos_encoding=True), stock)
        assert operator_calls(lambda: model(x, interpolate_pos_encoding=True)) == layer_calls(readout=False)
        with pytest.raises(ValueError, match="doesn't match model"):
            model(x)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("class_name", CLASSES)
def test_hidden_states_and_attentions_are_captured(class_name: str, attention: str) -> None:
    model, x = build(class_name, attention), pixels()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.inference_mode():
        stock = model(x, **asked)
        assert len(stock.hidden_states) == LAYERS + 1
        assert len(stock.attentions) == (LAYERS if attention == "eager" else 0)
        swap(model)
        assert_outputs_close(model(x, **asked), stock)
        hidden = model(x, output_hidden_states=True)
        assert len(hidden.hidden_states) == LAYERS + 1


def test_the_hook_left_by_one_request_does_not_forbid_whole_layers() -> None:
    model, x = build(attention="eager"), pixels()
    swap(model)
    model(x, output_attentions=True, output_hidden_states=True)
    assert model.base_model.layers[0].attention._forward_hooks
    assert operator_calls(lambda: model(x)) == layer_calls()
    # Hidden states come from the layers' own outputs; weights only from the attention.
    assert operator_calls(lambda: model(x, output_hidden_states=True)) == layer_calls(readout=False)
    assert "attention_qkv" not in operator_calls(lambda: model(x, output_attentions=True))


def test_hidden_states_asked_for_first_after_the_swap_are_found() -> None:
    model, x = build("ViTModel"), pixels()
    stock = copy.deepcopy(model)(x, output_hidden_states=True)
    swap(model)
    assert_outputs_close(model(x, output_hidden_states=True), stock)


def test_attention_masks_are_honoured() -> None:
    model, x = build("DeiTModel"), pixels()
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[:, 10:] = False
    with torch.inference_mode():
        stock, unmasked = model(x, attention_mask=mask), model(x)
        assert not torch.allclose(stock.last_hidden_state, unmasked.last_hidden_state, atol=1e-3)
        swap(model)
        assert_outputs_close(model(x, attention_mask=mask), stock)


def test_an_attention_function_of_the_users_own_is_called() -> None:
    calls = []

    def zero_attention(module, query, key, value, attention_mask, **kwargs):
        calls.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    transformers.AttentionInterface.register("zero_attention", zero_attention)
    model, x = build(attention="zero_attention"), pixels()
    with torch.inference_mode():
        stock = model(x).logits
        report = swap(model)
        assert_close(model(x).logits, stock)
    assert len(calls) == 2 * LAYERS
    assert report.kept["deit.layers.0"] == "attention: its attention implementation is 'zero_attention'"


def test_training_gives_stock_outputs_and_gradients() -> None:
    model, x = build("DeiTForImageClassificationWithTeacher").train(), pixels()
    out = model(x).logits
    expected = gradients(model, out.square().sum())
    swap(model)
    swapped = model(x).logits
    assert_close(swapped, out)
    assert_same_gradients(gradients(model, swapped.square().sum()), expected)


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_active_dropout_runs_stock_layers_with_the_same_masks(dropout: str) -> None:
    model, x = build(**{dropout: 0.3}).train(), pixels()
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        results.append(model(x).logits)
        swap(model)
    assert_close(results[1], results[0])
    model.eval()
    assert operator_calls(lambda: model(x)) == layer_calls()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, x = build().train(), pixels().requires_grad_()
    expected = gradients(model, model(x).logits.square().sum())
    swap(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed = []
    forward = modeling_deit.DeiTLayer.forward
    layer = model.base_model.layers[0]
    layer.register_forward_hook(lambda *_: recomputed.append("outside"))
    layer.layernorm_after.register_forward_hook(lambda *_: recomputed.append("inside"))
    assert_same_gradients(gradients(model, model(x).logits.square().sum()), expected)
    assert recomputed.count("inside") == 2 and recomputed.count("outside") == 1
    assert modeling_deit.DeiTLayer.forward is forward


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh"])
def test_both_gelus_are_fused(hidden_act: str) -> None:
    model, x = build(hidden_act=hidden_act), pixels()
    with torch.inference_mode():
        stock = model(x).logits
        assert not swap(model).kept
        assert_close(model(x).logits, stock)


@pytest.mark.parametrize("hidden_act", ["relu", "gelu_new", "quick_gelu", "gelu_python", "gelu_python_tanh"])
def test_another_activation_keeps_the_mlp_and_the_layer(hidden_act: str) -> None:
    model, x = build(hidden_act=hidden_act), pixels()
    with torch.inference_mode():
        stock = model(x).logits
        report = swap(model)
        assert_close(model(x).logits, stock)
    assert report.kept["deit.layers.0"] == f"mlp: {report.kept['deit.layers.0.mlp']}"
    assert report.kept["deit.layers.1.mlp"].startswith("its activation is not torch's GELU")
    assert operator_calls(lambda: model(x)) == {
        "patch_embed": 1,
        "layer_norm": 1 + 2 * LAYERS,
        "linear": 4 * LAYERS,
        "attention_qkv": LAYERS,
    }


def test_a_lora_linear_keeps_its_layer_and_is_computed() -> None:
    model, x = build(), pixels()
    attention = model.base_model.layers[0].attention
    attention.v_proj = LoraLinear(attention.v_proj)
    with torch.inference_mode():
        stock = model(x).logits
        report = swap(model)
        assert_close(model(x).logits, stock)
    assert report.kept == {
        "deit.layers.0": "attention: v_proj is a tests.swap.helpers.LoraLinear",
        "deit.layers.0.attention": "v_proj is a tests.swap.helpers.LoraLinear",
    }
    assert operator_calls(lambda: model(x)) == layer_calls(1, layer_norm=3, linear=2)


@pytest.mark.parametrize("inner", ["attention", "attention.q_proj", "layernorm_after", "mlp.activation_fn", "dropout"])
def test_hooks_on_inner_modules_fire(inner: str) -> None:
    model, x = build(), pixels()
    swap(model)
    expected = model(x).logits
    seen = []
    handle = model.base_model.layers[1].get_submodule(inner).register_forward_hook(lambda *_: seen.append(inner))
    assert_close(model(x).logits, expected)
    assert len(seen) == (2 if inner == "dropout" else 1)
    handle.remove()
    assert operator_calls(lambda: model(x)) == layer_calls()


def test_eager_attention_weights_reach_a_hook_on_the_attention() -> None:
    model, x = build(attention="eager"), pixels()
    weights = []
    model.base_model.layers[0].attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    model(x)
    swap(model)
    model(x)
    assert_close(weights[1], weights[0])


def test_copies_pickles_and_saved_models_are_swapped() -> None:
    model, x = build(), pixels()
    with torch.inference_mode():
        stock = model(x).logits
        swap(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(twin(x).logits, model(x).logits)
            assert operator_calls(lambda twin=twin: twin(x)) == layer_calls()
            restore(twin)
            assert torch.equal(twin(x).logits, stock)


def test_a_swapped_model_is_saved_and_loaded_as_stock(tmp_path) -> None:
    model, x = build(), pixels()
    swap(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.DeiTForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded.base_model.layers[0]) is modeling_deit.DeiTLayer
    assert_close(model(x).logits, loaded(x).logits)


def test_an_unknown_keyword_goes_to_stock_layers() -> None:
    model, x = build("ViTModel"), pixels()
    with torch.inference_mode():
        stock = model(x, is_causal=True)
        swap(model)
        assert_outputs_close(model(x, is_causal=True), stock)
        assert operator_calls(lambda: model(x, num_items_in_batch=3)) == layer_calls(readout=False)


def test_a_vision_encoder_inside_another_model_is_swapped() -> None:
    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = build("ViTModel")
            self.project = nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.project(self.encoder(x).last_hidden_state)

    model, x = Captioner(), pixels()
    stock = model(x)
    assert "encoder.layers.0" in swap(model).swapped
    assert_close(model(x), stock)


def test_a_swapped_model_compiles_whole() -> None:
    model, x = build(), pixels()
    with torch.no_grad():
        stock = model(x).logits
        swap(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(x).logits, stock)
    torch.compiler.reset()


def test_exported_graphs_hold_the_operators_of_the_parts() -> None:
    model, x = build(), pixels()
    swap(model)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert_close(program.module()(x).logits, model(x).logits)
    targets = [str(node.target) for node in program.graph.nodes]
    # While it is exported a model builds an attention mask, which only stock attention takes.
    assert targets.count("deit_fast.patch_embed.default") == 1
    assert targets.count("deit_fast.layer_norm.default") == 2 * LAYERS + 1
