"""What is checked: every operator, at the shapes of DeiT."""

from deit_fast import ops
from deit_fast.check.cases import DEIT_SIZES, OPS


def test_every_operator_is_checked():
    operators = {name.removesuffix("_branching") for name in ops.__all__}
    # Questions, and what is made of operators.
    others = {"known_count", "mlp_fits", "attend", "attention_half", "mlp_half", "AttentionHalf", "MlpHalf"}
    assert set(OPS) == operators - others


def test_a_gpu_is_checked_at_the_shapes_of_deit():
    assert [(size.width, size.heads, size.tokens) for size in DEIT_SIZES] == [
        (192, 3, 198),
        (384, 6, 198),
        (768, 12, 198),
    ]
