"""deit_fast.transformers without the library that it needs, or with too old a one."""

import pytest

from tests.support.absent import WITHOUT, printed

TOO_OLD = """
from transformers.models.vit import modeling_vit
del modeling_vit.ViTMLP
"""


def test_an_error_names_the_extra_where_transformers_is_missing() -> None:
    assert 'pip install "deit_fast[transformers]"' in printed(
        WITHOUT.format(library="transformers") + "import deit_fast.transformers"
    )


def test_an_error_names_the_versions_where_transformers_is_too_old() -> None:
    transformers = pytest.importorskip("transformers")
    found = f"needs transformers 5.16 or newer, found {transformers.__version__}"
    assert f'{found}: pip install "deit_fast[transformers]"' in printed(TOO_OLD + "import deit_fast.transformers")


def test_models_need_no_torchvision_and_the_image_processor_asks_for_it() -> None:
    pytest.importorskip("transformers")
    without = WITHOUT.format(library="torchvision") + "import deit_fast.transformers as t; print(t.DeiTModel.__name__)"
    assert printed(without).strip().endswith("DeiTModel")
    assert "requires the Torchvision library" in printed(without + "; t.DeiTImageProcessor")
