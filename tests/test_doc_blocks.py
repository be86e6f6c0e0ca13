"""Every Python block of the documentation runs, in the order of its page, from what a reader would have at hand."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import deit_fast
from tests.test_docs import PAGES, ROOT, blocks

NAME = "deit_small_distilled_patch16_224"
WITH_BLOCKS = [page for page in PAGES if blocks(page, "python")]
# Without one they are refused; tests/runtime has them.
NEED_A_GPU = ("deit_fast.tune(", "deit_fast.graph(")


def class_folders() -> None:
    """A student and a teacher in transformers' folders, small, and with image processors of different sizes."""
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

    from deit_fast.transformers import DeiTImageProcessor

    small = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    student = DeiTForImageClassificationWithTeacher(DeiTConfig(**small, image_size=32, num_labels=5))
    teacher = ViTForImageClassification(ViTConfig(**small, image_size=48, num_labels=5))
    for folder, model, size in (("student", student, 32), ("teacher", teacher, 48)):
        model.save_pretrained(folder)
        sides = {"height": size, "width": size}
        DeiTImageProcessor(size=sides, crop_size=sides).save_pretrained(folder)
    shutil.copytree(ROOT / "tests/keras/data/TFDeiTForImageClassification", "checkpoint")  # tf_model.h5


@pytest.fixture
def at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names and, in the working folder, files that the blocks take as given."""
    monkeypatch.chdir(tmp_path)
    create = timm.create_model
    # The pretrained weights are the hub's.
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **options: create(name, **options))
    torch.manual_seed(0)
    model = create(NAME, num_classes=1000)
    save_file(model.state_dict(), "weights.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.jpg")
    class_folders()
    return {
        "torch": torch,
        "deit_fast": deit_fast,
        "model": model,
        "images": torch.randn(2, 3, 224, 224),
        "labels": torch.tensor([1, 2]),
        "pixel_values": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32),
        "teacher": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)).eval(),
        "photographs": [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(8)],
    }


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page: Path, at_hand: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for block in blocks(page, "python"):
        if any(name in block for name in NEED_A_GPU) and not torch.cuda.is_available():
            continue
        # Each stands by itself, but for the names above: no block's model is the next one's.
        exec(compile(block, page.name, "exec"), dict(at_hand))
