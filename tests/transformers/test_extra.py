"""deit_fast.transformers without the library that it needs, or with too old a one."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == {library!r} else find(name, *rest)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""
TOO_OLD = """
from transformers.models.vit import modeling_vit
del modeling_vit.ViTMLP
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr


def test_an_error_names_the_extra_where_transformers_is_missing() -> None:
    assert 'pip install "deit_fast[transformers]"' in run(
        WITHOUT.format(library="transformers") + "import deit_fast.transformers"
    )


def test_an_error_names_the_versions_where_transformers_is_too_old() -> None:
    transformers = pytest.importorskip("transformers")
    found = f"needs transformers 5.16 or newer, found {transformers.__version__}"
    assert f'{found}: pip install "deit_fast[transformers]"' in run(TOO_OLD + "import deit_fast.transformers")


def test_models_need_no_torchvision_and_the_image_processor_asks_for_it() -> None:
    pytest.importorskip("transformers")
    without = WITHOUT.format(library="torchvision") + "import deit_fast.transformers as t; print(t.DeiTModel.__name__)"
    assert run(without).strip().endswith("DeiTModel")
    assert "requires the Torchvision library" in run(without + "; t.DeiTImageProcessor")
