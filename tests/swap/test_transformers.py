"""transformers' DeiT and ViT classes, stock and swapped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from deit_fast.swap import restore, swap
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls

transformers = pytest.importorskip("transformers")
from transformers.models.deit import modeling_deit  # noqa: E402

from tests.swap.transformers_models import CLASSES, assert_outputs_close, build, layer_calls, pixels  # noqa: E402


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


def test_training_gives_stock_outputs_and_gradients() -> None:
    model, x = build("DeiTForImageClassificationWithTeacher").train(), pixels()
    out = model(x).logits
    expected = gradients(model, out.square().sum())
    swap(model)
    swapped = model(x).logits
    assert_close(swapped, out)
    assert_same_gradients(gradients(model, swapped.square().sum()), expected)


def test_copies_are_swapped_and_pickles_are_stock() -> None:
    model, x = build(), pixels()
    with torch.inference_mode():
        stock = model(x).logits
        swap(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for twin in (pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
            assert type(twin) is transformers.DeiTForImageClassification
            assert type(twin.base_model.layers[0]) is modeling_deit.DeiTLayer
            assert torch.equal(twin(x).logits, stock)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x).logits, model(x).logits)
        assert operator_calls(lambda: twin(x)) == layer_calls()
        restore(twin)
        assert torch.equal(twin(x).logits, stock)


def test_a_swapped_model_is_saved_and_loaded_as_stock(tmp_path) -> None:
    model, x = build(), pixels()
    swap(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.DeiTForImageClassification.from_pretrained(tmp_path).eval()
    assert type(loaded.base_model.layers[0]) is modeling_deit.DeiTLayer
    assert_close(model(x).logits, loaded(x).logits)


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
