"""Checkpoints of each format, whole or with something wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")
pytest.importorskip("transformers")

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError  # noqa: E402

from deit_fast.keras import (  # noqa: E402
    TFDeiTForImageClassification,
    TFDeiTForImageClassificationWithTeacher,
    TFDeiTForMaskedImageModeling,
    TFDeiTModel,
    pretrained,
)

NAME = "TFDeiTForImageClassification"


@pytest.fixture
def on_the_hub(monkeypatch):
    """Stands for the hub: it has the files of a folder, of each model."""

    def serve(folder, missing=EntryNotFoundError):
        asked = []

        def download(name, file_name, **options):
            asked.append((name, file_name, options))
            if not (folder / file_name).exists():
                raise missing(file_name)
            return str(folder / file_name)

        monkeypatch.setattr(pretrained, "hf_hub_download", download)
        monkeypatch.setattr(
            pretrained.DeiTConfig,
            "get_config_dict",
            classmethod(lambda cls, *_, **__: (json.loads((folder / "config.json").read_text()), {})),
        )
        return asked

    return serve


@pytest.fixture
def folder(reference, tmp_path):
    """A copy of a TensorFlow checkpoint, to spoil."""
    shutil.copytree(reference(NAME)[0], tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def logits_error(model, reference):
    _, given, expected = reference(NAME)
    return np.abs(model(given["pixel_values"]).logits.detach().numpy() - expected["logits"]).max()


# Formats


@pytest.mark.parametrize("layout", ["sharded", "safetensors"])
def test_shards_and_safetensors_of_tensorflow_hold_the_same_model(layout, reference):
    model = TFDeiTForImageClassification.from_pretrained(reference(NAME)[0].parent / layout)
    assert logits_error(model, reference) < 1e-4


def test_pytorch_checkpoints_load(folder, reference):
    state_dict = TFDeiTForImageClassification.from_pretrained(folder).torch_model.state_dict()
    (folder / "tf_model.h5").unlink()
    torch.save(state_dict, folder / "pytorch_model.bin")
    assert logits_error(TFDeiTForImageClassification.from_pretrained(folder, from_pt=True), reference) < 1e-4


def test_a_name_on_the_hub_is_downloaded(reference, on_the_hub, folder):
    asked = on_the_hub(folder)
    model = TFDeiTForImageClassification.from_pretrained("someone/deit", revision="main")
    assert logits_error(model, reference) < 1e-4
    assert {(name, *options.items()) for name, _, options in asked} == {("someone/deit", ("revision", "main"))}
    assert asked[0][1] == "config.json" and asked[-1][1] == "tf_model.h5"


def test_a_cache_serves_without_the_hub_and_an_error_says_that_it_was_not_reached(reference, on_the_hub, folder):
    on_the_hub(folder, missing=LocalEntryNotFoundError)
    assert logits_error(TFDeiTForImageClassification.from_pretrained("someone/deit"), reference) < 1e-4
    (folder / "tf_model.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"someone/deit: the hub was not reached, and the cache has no weights"):
        TFDeiTForImageClassification.from_pretrained("someone/deit")
    on_the_hub(folder)
    with pytest.raises(FileNotFoundError, match=r"someone/deit on the hub has no weights"):
        TFDeiTForImageClassification.from_pretrained("someone/deit")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[", "is no JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {"a": "../outside.h5"}}', r"no plain file names: '\.\./outside\.h5'"),
    ],
)
def test_a_wrong_index_on_the_hub_is_an_error_before_any_shard(index, message, on_the_hub, folder):
    (folder / "tf_model.h5").unlink()
    (folder / "tf_model.h5.index.json").write_text(index)
    asked = on_the_hub(folder)
    with pytest.raises(ValueError, match=message):
        TFDeiTForImageClassification.from_pretrained("someone/deit")
    assert asked[-1][1] == "tf_model.h5.index.json"


# Configuration and heads


def test_keywords_are_the_configurations_and_keras(folder):
    names = {number: f"class {number}" for number in range(5)}
    keywords = {"dtype": "mixed_bfloat16", "name": "mine", "id2label": names}
    model = TFDeiTForImageClassification.from_pretrained(folder, **keywords)
    assert (model.name, model.dtype_policy.name, model.config.id2label) == ("mine", "mixed_bfloat16", names)


def test_heads_of_another_class_are_left_out_and_its_own_start_at_random(reference):
    folder = reference("TFDeiTForImageClassificationWithTeacher")[0]
    with pytest.warns(UserWarning, match="has no fitting classifier for this model: started at random"):
        model = TFDeiTForImageClassification.from_pretrained(folder)
    with pytest.warns(UserWarning, match=r"has no fitting deit.embeddings.mask_token, decoder for this model"):
        TFDeiTForMaskedImageModeling.from_pretrained(folder)
    both = TFDeiTForImageClassificationWithTeacher.from_pretrained(folder)
    assert torch.equal(model.torch_model.deit.layernorm.weight, both.torch_model.deit.layernorm.weight)
    with pytest.warns(UserWarning, match="has no fitting cls_classifier, distillation_classifier"):
        TFDeiTForImageClassificationWithTeacher.from_pretrained(reference("TFDeiTModel")[0])
    assert TFDeiTModel.from_pretrained(folder, add_pooling_layer=False).torch_model.pooler is None


def test_a_head_of_other_classes_starts_at_random_where_that_is_asked_for(folder):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes=True starts it anew") as error:
        TFDeiTForImageClassification.from_pretrained(folder, num_labels=3)
    assert "misshapen: classifier.weight, expected (3, 24), found (5, 24)" in str(error.value)
    with pytest.warns(UserWarning, match="has no fitting classifier"):
        model = TFDeiTForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)


# What is wrong is said


def test_every_wrong_weight_of_an_h5_file_is_named(folder):
    layer = "deit/tf_dei_t_for_image_classification/deit/encoder/layer_._0"
    with h5py.File(folder / "tf_model.h5", "a") as file:
        del file[f"{layer}/attention/attention/query/kernel:0"]
        del file[f"{layer}/layernorm_after/gamma:0"]
        file[f"{layer}/layernorm_after/gamma:0"] = np.ones(7, np.float32)
        file[f"{layer}/extra/kernel:0"] = np.ones((2, 3), np.float32)
        del file["classifier/tf_dei_t_for_image_classification/classifier/bias:0"]
    with pytest.raises(ValueError) as error:
        TFDeiTForImageClassification.from_pretrained(folder)
    for problem in (
        "missing: deit.layers.0.attention.q_proj.weight, expected (24, 24)",
        "missing: classifier.bias, expected (5,)",
        "unexpected: deit.encoder.layer.0.extra.weight, found (3, 2)",
        "misshapen: deit.encoder.layer.0.layernorm_after.weight, expected (24,), found (7,)",
    ):
        assert problem in str(error.value)


def test_a_wrong_weight_of_a_safetensors_file_is_named(reference, tmp_path):
    source = reference(NAME)[0].parent / "safetensors"
    weights = load_file(source / "model.safetensors")
    del weights["deit/layernorm/beta:0"]
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(source / "config.json", tmp_path)
    with pytest.raises(ValueError, match=r"missing: deit\.layernorm\.bias, expected \(24,\)"):
        TFDeiTForImageClassification.from_pretrained(tmp_path)


def test_another_architecture_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 24}))
    with pytest.raises(ValueError, match=r"holds no DeiT: the model_type in its config\.json is 'bert'"):
        TFDeiTForImageClassification.from_pretrained(folder)


def test_a_truncated_h5_file_and_missing_shards_are_refused(folder, reference, tmp_path):
    content = (folder / "tf_model.h5").read_bytes()
    (folder / "tf_model.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="no readable h5 file"):
        TFDeiTForImageClassification.from_pretrained(folder)
    shutil.copytree(reference(NAME)[0].parent / "sharded", tmp_path / "sharded")
    (tmp_path / "sharded" / "tf_model-00002-of-00003.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks shards.*tf_model-00002-of-00003\.h5"):
        TFDeiTForImageClassification.from_pretrained(tmp_path / "sharded")
