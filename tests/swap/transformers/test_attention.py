import pytest
import torch

from deit_fast.swap import swap
from tests.swap.helpers import assert_close

transformers = pytest.importorskip("transformers")
from tests.swap.transformers_models import LAYERS, assert_outputs_close, build, pixels  # noqa: E402


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


def test_eager_attention_weights_reach_a_hook_on_the_attention() -> None:
    model, x = build(attention="eager"), pixels()
    weights = []
    model.base_model.layers[0].attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    model(x)
    swap(model)
    model(x)
    assert_close(weights[1], weights[0])
