"""examples/original_deit.py: a script that imports and builds what the original repository's does."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm")
EXAMPLE = Path(__file__).parents[2] / "examples" / "original_deit.py"
ROOT = Path(__file__).parents[2]
MODELS = """
import sys
sys.path.append({root!r})
from timm.models.registry import register_model
from timm.models.vision_transformer import VisionTransformer, _cfg
from tests.swap.original_models import DeiT3

@register_model
def original_first(pretrained=False, **kwargs):
    return VisionTransformer(embed_dim=96, depth=2, num_heads=3, **kwargs)

@register_model
def original_third(pretrained=False, **kwargs):
    return DeiT3()
"""
MAIN = """
import sys
import torch
from timm.data.transforms import _pil_interp
from timm.models import create_model
import models

assert _pil_interp("bicubic") == 3
torch.cuda.synchronize()
for name in sys.argv[1:]:
    model = create_model(name, pretrained=False, drop_block_rate=None, num_classes=5, img_size=32)
    print(type(model).__name__)
"""


def test_its_models_are_built_and_swapped(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text(MODELS.format(root=str(ROOT)))
    (tmp_path / "main.py").write_text(MAIN)
    command = [sys.executable, "-m", "deit_fast", "run", str(EXAMPLE), str(tmp_path / "main.py")]
    done = subprocess.run([*command, "original_first", "original_third"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "VisionTransformer\nDeiT3\n"
    assert done.stderr.count(": 13 modules swapped") == 2
