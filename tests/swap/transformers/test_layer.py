import pytest
import torch

import deit_fast
from deit_fast.swap import swap
from tests.swap.helpers import LoraLinear, assert_close, assert_same_gradients, gradients, operator_calls

transformers = pytest.importorskip("transformers")
from transformers.models.deit import modeling_deit  # noqa: E402

from tests.swap.transformers_models import (  # noqa: E402
    assert_outputs_close,
    build,
    layer_calls,
    pixels,
)


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


def test_an_unknown_keyword_goes_to_stock_layers() -> None:
    model, x = build("ViTModel"), pixels()
    with torch.inference_mode():
        stock = model(x, is_causal=True)
        swap(model)
        assert_outputs_close(model(x, is_causal=True), stock)
        assert operator_calls(lambda: model(x, num_items_in_batch=3)) == layer_calls(readout=False)


@pytest.mark.parametrize("keywords", [{"use_cache": False}, {"use_cache": True, "labels": torch.tensor([1, 2])}])
def test_keywords_that_no_layer_reads_change_nothing(keywords: dict) -> None:
    model, x = build("DeiTForImageClassificationWithTeacher"), pixels()
    with torch.no_grad():
        stock = model(x, **keywords).logits
        swap(model)
        assert_close(model(x, **keywords).logits, stock)
    assert deit_fast.report(model).stock == {}
    assert deit_fast.report(model).calls["deit.layers.0"].fused == 1


def test_a_keyword_that_attention_reads_goes_to_stock_layers() -> None:
    model, tokens = build(), torch.randn(2, 5, 64)
    layer = model.base_model.layers[0]
    with torch.no_grad():
        expected = layer(tokens, is_causal=True)
        swap(model)
        assert_close(layer(tokens, is_causal=True), expected)
    assert deit_fast.report(layer).stock[""] == "is called with is_causal"


def test_a_model_that_the_trainer_trains_runs_on_the_operators(tmp_path) -> None:
    pytest.importorskip("accelerate")
    model = build("ViTForImageClassification")
    swap(model)
    data = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(torch.randn(8, *pixels().shape[1:]))]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=data).train()
    report = deit_fast.report(model)
    assert report.stock == {}
    assert all(report.calls[name].fused == 2 for name in ("", "vit.embeddings", "vit.layers.0", "vit.layernorm"))
