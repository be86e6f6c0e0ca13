"""The classes of deit_fast.transformers beside transformers' own."""

import copy
import json
import pickle

import pytest
import torch

import deit_fast
from tests.swap.helpers import assert_close, assert_same_gradients, gradients, operator_calls

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402

from tests.swap.transformers_models import assert_outputs_close, layer_calls, pixels  # noqa: E402
from tests.transformers.models import CLASSES, CLASSIFIERS, ours, same_weights, stock  # noqa: E402

each_class = pytest.mark.parametrize("class_name", CLASSES)


def loader(library: object, class_name: str):
    return getattr(library, class_name).from_pretrained


@each_class
def test_a_model_is_born_swapped_and_answers_as_stock(class_name: str) -> None:
    model, expected, x = ours(class_name), stock(class_name), pixels()
    assert isinstance(model, getattr(transformers, class_name)) and type(model).__name__ == class_name
    with torch.inference_mode():
        assert_outputs_close(model(x), expected(x))
    assert operator_calls(lambda: model(x)) == layer_calls(readout="ForImageClassification" in class_name)
    report = deit_fast.report(model)
    assert not report.stock and all(report.calls[name].fused for name in report.calls if name.endswith("layers.0"))
    assert not deit_fast.swap(model).kept
    # As PEFT writes into an adapter's folder.
    assert type(model).__module__ == getattr(transformers, class_name).__module__


@each_class
def test_training_gives_stocks_gradients(class_name: str) -> None:
    model, expected, x = ours(class_name).train(), stock(class_name).train(), pixels()
    key = next(iter(model(x).keys()))
    result = gradients(model, model(x)[key].square().sum())
    assert_same_gradients(result, gradients(expected, expected(x)[key].square().sum()))


@each_class
def test_the_start_weights_are_stocks(class_name: str) -> None:
    models = []
    for library in (deit_fast.transformers, transformers):
        torch.manual_seed(3)
        models.append(getattr(library, class_name)(stock(class_name).config))
    assert same_weights(*models)


@pytest.mark.parametrize("class_name", CLASSIFIERS)
@pytest.mark.parametrize(
    "options, labels",
    [
        ({"num_labels": 1}, torch.randn(2)),
        ({"problem_type": "regression"}, torch.randn(2, 10)),
        ({}, torch.tensor([3, 9])),
        ({}, torch.eye(10)[:2]),
    ],
    ids=["regression to one", "regression", "single label", "multi label"],
)
def test_each_kind_of_loss_is_stocks(class_name: str, options: dict, labels: torch.Tensor) -> None:
    model, expected, x = ours(class_name, **options), stock(class_name, **options), pixels()
    assert_outputs_close(model(x, labels=labels), expected(x, labels=labels))
    assert model.config.problem_type == expected.config.problem_type


@each_class
def test_hidden_states_and_attentions_are_recorded(class_name: str) -> None:
    x, wanted = pixels(), {"output_hidden_states": True, "output_attentions": True}
    model, expected = (build(class_name, attn_implementation="eager") for build in (ours, stock))
    with torch.inference_mode():
        result = model(x, **wanted)
        assert len(result.hidden_states) == 3 and result.attentions[0].shape[1] == 2
        assert_outputs_close(result, expected(x, **wanted))


@each_class
def test_positions_are_interpolated_for_larger_images(class_name: str) -> None:
    model, expected, x = ours(class_name), stock(class_name), pixels(size=48)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(x)
    with torch.inference_mode():
        assert_outputs_close(model(x, interpolate_pos_encoding=True), expected(x, interpolate_pos_encoding=True))


def test_masked_patches_are_reconstructed_as_stock() -> None:
    model, expected, x = (*(build("DeiTForMaskedImageModeling") for build in (ours, stock)), pixels())
    mask = torch.rand(2, 16) < 0.5
    result, control = model(x, bool_masked_pos=mask), expected(x, bool_masked_pos=mask)
    assert_outputs_close(result, control)
    assert_same_gradients(gradients(model, result.loss), gradients(expected, control.loss))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model, expected, x = ours().train(), stock().train(), pixels()
    model.gradient_checkpointing_enable()
    result = gradients(model, model(x, labels=torch.tensor([1, 2])).loss)
    assert_same_gradients(result, gradients(expected, expected(x, labels=torch.tensor([1, 2])).loss))


def test_a_tuple_comes_where_one_is_asked_for() -> None:
    model, x = ours("DeiTForImageClassificationWithTeacher"), pixels()
    logits, cls_logits, distillation_logits = model(x, return_dict=False)
    assert_close((cls_logits + distillation_logits) / 2, logits)


# Folders ------------------------------------------------------------------------------------------------------------


@each_class
def test_each_library_loads_what_the_other_saved(class_name: str, tmp_path) -> None:
    x = pixels()
    for build, library in ((ours, transformers), (stock, deit_fast.transformers)):
        saved = build(class_name)
        saved.save_pretrained(tmp_path / library.__name__)
        loaded = loader(library, class_name)(tmp_path / library.__name__).eval()
        assert type(loaded) is getattr(library, class_name) and same_weights(loaded, saved)
        with torch.inference_mode():
            assert_outputs_close(loaded(x), saved(x))
    # Nothing in the folder says who wrote it.
    files = [tmp_path / library.__name__ for library in (transformers, deit_fast.transformers)]
    configs = [json.loads((folder / "config.json").read_text()) for folder in files]
    for each in configs:
        each.pop("keys_to_ignore_at_inference", None)
    assert configs[0] == configs[1] and configs[0]["architectures"] == [class_name]
    weights = [load_file(folder / "model.safetensors") for folder in files]
    assert weights[0].keys() == weights[1].keys()


@each_class
@pytest.mark.parametrize("original", [True, False], ids=["older names", "today's names"])
def test_a_sharded_folder_is_loaded_on_the_fused_path(class_name: str, original: bool, tmp_path) -> None:
    saved = ours(class_name)
    saved.save_pretrained(tmp_path, max_shard_size="100KB", save_original_format=original)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = loader(deit_fast.transformers, class_name)(tmp_path).eval()
    assert same_weights(loaded, saved)
    loaded(pixels())
    assert not deit_fast.report(loaded).stock and not any(p.is_meta for p in loaded.parameters())


def test_a_checkpoint_of_another_architecture_is_told_of(tmp_path, caplog) -> None:
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    transformers.BertModel(transformers.BertConfig(**settings, vocab_size=10)).save_pretrained(tmp_path)
    messages = []
    for library in (transformers, deit_fast.transformers):
        caplog.clear()
        library.DeiTModel.from_pretrained(tmp_path)
        messages.append(sorted(record.getMessage() for record in caplog.records))
    assert "a model of type `bert` to instantiate a model of type `deit`" in "".join(messages[1])
    assert messages[1] == messages[0]


@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_dtype_and_device_map(device_map: str | None, tmp_path) -> None:
    if device_map:
        pytest.importorskip("accelerate")
    saved = stock()
    saved.save_pretrained(tmp_path)
    options = {"dtype": torch.bfloat16, "device_map": device_map}
    load = loader(deit_fast.transformers, "DeiTForImageClassification")
    model, expected = load(tmp_path, **options), type(saved).from_pretrained(tmp_path, **options)
    with torch.inference_mode():
        logits = model(pixels := torch.randn(2, 3, 32, 32)).logits
        assert_close(logits, expected(pixels).logits)
    assert logits.dtype is torch.bfloat16 and not deit_fast.report(model).stock


def test_weights_that_a_checkpoint_lacks_are_initialised_as_stock(tmp_path) -> None:
    ours("DeiTModel").save_pretrained(tmp_path)
    models = []
    for library in (deit_fast.transformers, transformers):
        torch.manual_seed(5)
        models.append(loader(library, "DeiTForImageClassification")(tmp_path, num_labels=7))
    assert same_weights(*models) and models[0].classifier.weight.shape == (7, 64)


def test_a_checkpoint_with_other_classes_is_loaded_when_told_so(tmp_path) -> None:
    ours().save_pretrained(tmp_path)
    load = loader(deit_fast.transformers, "DeiTForImageClassification")
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        load(tmp_path, num_labels=3)
    assert load(tmp_path, num_labels=3, ignore_mismatched_sizes=True).classifier.out_features == 3


@each_class
def test_load_state_dict_takes_the_names_in_a_folder(class_name: str, tmp_path) -> None:
    saved, model = stock(class_name), ours(class_name, seed=1)
    saved.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert names.keys() != model.state_dict().keys()
    model.load_state_dict(names)
    assert same_weights(model, saved)
    model.load_state_dict(ours(class_name, seed=2).state_dict())
    assert not same_weights(model, saved)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"no_such_key\""):
        model.load_state_dict({**names, "no_such_key": torch.zeros(1)})


def test_auto_classes_go_on_giving_stock_classes(tmp_path) -> None:
    ours().save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(model) is transformers.DeiTForImageClassification
    assert type(transformers.AutoModel.from_pretrained(tmp_path)) is transformers.DeiTModel


def test_a_pipeline_classifies_images(tmp_path) -> None:
    pytest.importorskip("torchvision")
    image = pytest.importorskip("PIL.Image").new("RGB", (40, 50), (200, 30, 90))
    processor = deit_fast.transformers.DeiTImageProcessor(size=36, crop_size=32)
    answers = [
        transformers.pipeline("image-classification", model=build(class_name), image_processor=processor)(image)
        for class_name in (*CLASSIFIERS, "DeiTForImageClassificationWithTeacher")
        for build in (ours, stock)
    ]
    for result, expected in zip(answers[::2], answers[1::2], strict=True):
        assert [each["label"] for each in result] == [each["label"] for each in expected]
        assert [each["score"] for each in result] == pytest.approx([each["score"] for each in expected], abs=1e-5)


# Copies -------------------------------------------------------------------------------------------------------------


@each_class
def test_copies_and_pickles_are_of_the_class_and_swapped(class_name: str) -> None:
    model, x = ours(class_name), pixels()
    with torch.inference_mode():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(twin) is type(model) and same_weights(twin, model)
            assert_outputs_close(twin(x), expected)
            assert not deit_fast.report(twin).stock and deit_fast.report(twin).calls.keys()


class Derived(deit_fast.transformers.DeiTForImageClassification):
    """Somebody's own."""


def test_a_class_derived_from_ours_is_pickled_by_its_name() -> None:
    model = Derived(ours().config)
    assert type(copy.deepcopy(model)) is Derived
    reduced = model.__reduce_ex__(2)
    assert reduced[1] == (Derived,)


def test_options_of_a_swap_survive_a_deep_copy() -> None:
    model = ours("DeiTModel")
    deit_fast.swap(model, memory="low")
    assert copy.deepcopy(model).layers[0]._deit_fast_memory == "low"


@each_class
def test_restore_gives_stock_code_and_swap_the_operators_again(class_name: str) -> None:
    model, expected, x = ours(class_name), stock(class_name), pixels()
    deit_fast.restore(model)
    assert not operator_calls(lambda: model(x))
    with torch.inference_mode():
        assert all(torch.equal(model(x)[key], value) for key, value in expected(x).items())
    deit_fast.swap(model)
    assert operator_calls(lambda: model(x)) == layer_calls(readout="ForImageClassification" in class_name)


def test_a_compiled_model_agrees() -> None:
    model, x = ours("DeiTForImageClassificationWithTeacher"), pixels()
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_outputs_close(compiled(x), stock("DeiTForImageClassificationWithTeacher")(x))
    torch.compiler.reset()
