"""Models that a program builds are swapped when they have been built, whoever derives from their classes."""

import subprocess
import sys
import threading

import pytest
import timm
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import deit_fast
from deit_fast.swap.birth import swapped_at_birth

SIZES = {"img_size": 32, "embed_dim": 96, "depth": 2, "num_heads": 3, "num_classes": 5}
CONFIG = {
    "image_size": 32,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
}


@pytest.fixture
def born():
    """What was swapped within the test: (class name, modules swapped, modules kept)."""
    found = []
    with swapped_at_birth(lambda model, report: found.append((type(model).__name__, report))):
        yield found


def is_swapped(model: nn.Module) -> bool:
    return bool(deit_fast.report(model).calls)


def transformers_model(name: str) -> nn.Module:
    library = name.partition("For")[0]
    config = getattr(transformers, f"{library.removesuffix('Model')}Config")(**CONFIG)
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    "build",
    [
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SIZES),
        lambda: timm.models.create_model("deit3_small_patch16_224", **SIZES),
        lambda: VisionTransformer(**SIZES),
        lambda: timm.models.deit.VisionTransformerDistilled(**SIZES),
        *(
            lambda name=name: transformers_model(name)
            for name in (
                "DeiTModel",
                "DeiTForMaskedImageModeling",
                "DeiTForImageClassification",
                "DeiTForImageClassificationWithTeacher",
                "ViTModel",
                "ViTForMaskedImageModeling",
                "ViTForImageClassification",
            )
        ),
    ],
)
def test_a_model_is_swapped_once_when_it_is_whole(build, born):
    model = build()
    assert is_swapped(model)
    ((name, report),) = born
    assert name == type(model).__name__ and not report.kept
    assert set(report.swapped) == set(deit_fast.swap(model).swapped)


def test_a_class_derived_meanwhile_is_swapped_after_its_own_constructor(born):
    class Mine(VisionTransformer):
        def __init__(self):
            super().__init__(**SIZES)
            self.blocks.append(timm.models.vision_transformer.Block(96, 3))

    Mine()
    ((name, report),) = born
    assert name == "Mine" and "blocks.2" in report.swapped


def test_other_models_and_what_is_built_outside_stay_as_they_are():
    before = {"__init__": VisionTransformer.__init__, "create_model": timm.models._factory.create_model}
    found = []
    with swapped_at_birth(lambda *what: found.append(what)):
        assert not is_swapped(timm.create_model("test_resnet"))
    assert not found
    assert not is_swapped(timm.create_model("deit_tiny_patch16_224", **SIZES))
    assert not is_swapped(VisionTransformer(**SIZES))
    assert before == {"__init__": VisionTransformer.__init__, "create_model": timm.models._factory.create_model}
    assert "__init_subclass__" not in vars(VisionTransformer)


def test_a_constructor_that_fails_leaves_the_next_model_swapped(born):
    with pytest.raises(TypeError):
        VisionTransformer(no_such_argument=1)
    assert is_swapped(VisionTransformer(**SIZES))


def test_models_of_several_threads_are_all_swapped(born):
    models = []
    threads = [threading.Thread(target=lambda: models.append(VisionTransformer(**SIZES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(born) == 4 and all(map(is_swapped, models))


def test_weights_loaded_by_from_pretrained_are_stocks(tmp_path):
    stock = transformers_model("DeiTForImageClassificationWithTeacher").eval()
    stock.save_pretrained(tmp_path)
    with swapped_at_birth(lambda *_: None):
        model = transformers.DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path)
        auto = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert is_swapped(model) and is_swapped(auto)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(images).logits, stock(images).logits, rtol=0, atol=2e-5)
    assert deit_fast.report(model).calls[""].fused == 1


def test_a_library_is_not_imported_for_it_and_found_when_it_is():
    program = """
import sys
from deit_fast.swap.birth import swapped_at_birth
found = []
with swapped_at_birth(lambda model, report: found.append(type(model).__name__)):
    assert not {"timm", "transformers"} & set(sys.modules)
    import timm
    from timm.models import create_model
    create_model("deit_tiny_patch16_224", img_size=32, depth=1)
    from timm.models.vision_transformer import VisionTransformer
    VisionTransformer(img_size=32, depth=1)
    assert "transformers" not in sys.modules
    from transformers import DeiTConfig, DeiTModel
    DeiTModel(DeiTConfig(hidden_size=96, num_attention_heads=3, num_hidden_layers=1))
assert found == ["VisionTransformer", "VisionTransformer", "DeiTModel"], found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
