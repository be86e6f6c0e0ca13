import copy

import pytest
import torch

from deit_fast.swap import swap
from tests.swap.helpers import operator_calls

pytest.importorskip("transformers")
from tests.swap.transformers_models import CLASSES, LAYERS, assert_outputs_close, build, layer_calls, pixels


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
    assert "attention" not in operator_calls(lambda: model(x, output_attentions=True))


def test_hidden_states_asked_for_first_after_the_swap_are_found() -> None:
    model, x = build("ViTModel"), pixels()
    stock = copy.deepcopy(model)(x, output_hidden_states=True)
    swap(model)
    assert_outputs_close(model(x, output_hidden_states=True), stock)
