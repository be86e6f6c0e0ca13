"""Names there and back; `test_checkpoint.py` has the ways in by files of every kind."""

import pytest
import torch

from deit_fast.models import VisionTransformer
from deit_fast.models.key_maps import to_original_names, to_timm_names, to_transformers_names


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_names_of_transformers_are_those_it_writes_and_lead_back(name, small_config, transformers_model, tmp_path):
    state_dict = VisionTransformer(small_config(name)).state_dict()
    theirs = to_transformers_names(state_dict)
    kind = "DeiTForImageClassificationWithTeacher" if "distilled" in name else "ViTForImageClassification"
    transformers_model(kind).save_pretrained(tmp_path)
    from safetensors.torch import load_file

    assert {key: t.shape for key, t in theirs.items()} == {
        key: t.shape for key, t in load_file(tmp_path / "model.safetensors").items()
    }
    back = {key: entry.tensor for key, entry in to_timm_names(theirs).items()}
    assert back.keys() == state_dict.keys() and all(torch.equal(back[key], state_dict[key]) for key in back)


def test_names_of_the_original_repository_differ_in_layer_scale_alone(small_config):
    state_dict = VisionTransformer(small_config("deit3_small_patch16_224")).state_dict()
    theirs = to_original_names(state_dict)
    scales = [f"blocks.{block}.gamma_{number}" for block in range(2) for number in (1, 2)]
    assert sorted(theirs.keys() - state_dict.keys()) == scales
    assert list(to_timm_names(theirs)) == list(state_dict)
