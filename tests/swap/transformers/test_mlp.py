import pytest
import torch

from deit_fast.swap import swap
from tests.swap.helpers import assert_close, operator_calls

pytest.importorskip("transformers")
from tests.swap.transformers_models import LAYERS, build, pixels


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
        "attention": LAYERS,
    }
