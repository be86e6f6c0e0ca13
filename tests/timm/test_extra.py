"""deit_fast.timm without the library that it needs, or with too old a one."""

import timm

from tests.support.absent import WITHOUT, printed

TOO_OLD = """
from timm.models import vision_transformer
vision_transformer.Block.forward = lambda self, x, attn_mask=None: x
"""


def test_an_error_names_the_extra_where_timm_is_missing() -> None:
    assert 'pip install "deit_fast[timm]"' in printed(WITHOUT.format(library="timm") + "import deit_fast.timm")


def test_an_error_names_the_versions_where_timm_is_too_old() -> None:
    found = f"needs timm 1.0.31 or newer, found {timm.__version__}"
    assert f'{found}: pip install "deit_fast[timm]"' in printed(TOO_OLD + "import deit_fast.timm")
