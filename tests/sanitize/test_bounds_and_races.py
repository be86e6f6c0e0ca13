"""Every operator, forward and backward, keeps within its tensors, does not race, and reads only what was written."""

import pytest

from deit_fast.kernels.linear import settings as of_linear
from deit_fast.kernels.patch_embed import settings as of_patch_embed
from tests.sanitize.cases import (
    BFLOAT16,
    CASES,
    FLOAT32,
    SanitizerCase,
    attention_branch,
    layer_norm_qkv,
    linear,
    mlp_branch,
)
from tests.sanitize.cases import patch_embed as patch_embed_case
from tests.sanitize.check import check


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case):
    check(case)


@pytest.mark.parametrize("dtype", (FLOAT32, BFLOAT16), ids=str)
@pytest.mark.parametrize("op", (linear, layer_norm_qkv, attention_branch, mlp_branch, patch_embed_case))
def test_weight_gradient_summed_in_parts(op, dtype, monkeypatch):
    """As for the many rows of a real batch."""
    monkeypatch.setattr(of_linear, "splits", lambda *_: 4)
    tile, _ = of_patch_embed.patch_embed_weight_gradient(195, 64, 48, dtype.itemsize, "sm_90")
    monkeypatch.setattr(of_patch_embed, "patch_embed_weight_gradient", lambda *_: (tile, 64))
    kept = (0, 2) if op in (attention_branch, mlp_branch) else None
    check(SanitizerCase(op, dtype, False, "contiguous", 3, 65, 64, kept, 90))
