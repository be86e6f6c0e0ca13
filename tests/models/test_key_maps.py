"""Names there and back; `test_checkpoint.py` has the ways in by files of every kind."""

import pytest
import torch

from deit_fast.models import VisionTransformer
from deit_fast.models.key_maps import (
    from_tensorflow,
    to_original_names,
    to_timm_names,
    to_transformers_modules,
    to_transformers_names,
)


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


@pytest.mark.parametrize(
    "name, expected",
    [
        ("deit/tf_dei_t_model/deit/embeddings/cls_token:0", "deit.embeddings.cls_token"),
        ("deit/encoder/layer_._11/output/dense/bias:0", "deit.encoder.layer.11.output.dense.bias"),
        ("deit/mine/deit/layernorm/gamma:0", "deit.layernorm.weight"),
        ("deit/layernorm/beta:0", "deit.layernorm.bias"),
        ("classifier/mine/classifier/bias:0", "classifier.bias"),
        ("decoder/mine/decoder/0/bias:0", "decoder.0.bias"),
    ],
)
def test_tensorflow_names_become_those_of_transformers(name, expected):
    assert list(from_tensorflow({name: torch.zeros(2)})) == [expected]


def test_tensorflow_kernels_become_weights():
    linear, convolution = torch.randn(3, 2), torch.randn(4, 5, 3, 2)  # [in, out]; [height, width, in, out]
    weights = from_tensorflow({"a/dense/kernel:0": linear, "a/projection/kernel:0": convolution})
    assert torch.equal(weights["a.dense.weight"], linear.T)
    assert torch.equal(weights["a.projection.weight"], convolution.movedim((3, 2), (0, 1)))


def test_checkpoint_names_become_those_of_todays_modules(transformers_model, tmp_path):
    from safetensors.torch import load_file

    for kind in ("DeiTForImageClassificationWithTeacher", "DeiTModel"):
        model = transformers_model(kind)
        model.save_pretrained(tmp_path / kind)
        prefix = "deit." if kind == "DeiTModel" else ""
        expected = {prefix + name for name in model.state_dict()}
        assert to_transformers_modules(load_file(tmp_path / kind / "model.safetensors")).keys() == expected
        assert to_transformers_modules(model.state_dict()).keys() == expected
