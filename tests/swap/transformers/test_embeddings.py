import pytest
import torch

from deit_fast.swap import restore, swap
from tests.swap.helpers import assert_close, operator_calls

pytest.importorskip("transformers")
from tests.swap.transformers_models import assert_outputs_close, build, layer_calls, pixels


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
