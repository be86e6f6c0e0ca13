"""TF32 is used where stock PyTorch would use it, whichever of its settings were made, in whichever order."""

from itertools import permutations

import pytest

from tests.support.compiled import printed_by

# Statement → what it is said of, and whether it allows TF32.
SETTINGS = {
    "torch.backends.cuda.matmul.allow_tf32 = True": ("matmul", True),
    "torch.backends.cuda.matmul.allow_tf32 = False": ("matmul", False),
    "torch.set_float32_matmul_precision('medium')": ("matmul", True),
    "torch.set_float32_matmul_precision('high')": ("matmul", True),
    "torch.set_float32_matmul_precision('highest')": ("matmul", False),
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": ("matmul", True),
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": ("matmul", False),
    "torch.backends.cudnn.fp32_precision = 'tf32'": ("cuda", True),
    "torch.backends.fp32_precision = 'tf32'": ("all", True),
    "torch.backends.fp32_precision = 'ieee'": ("all", False),
}
PROGRAMS = [*permutations(SETTINGS, 1), *permutations(SETTINGS, 2)]


def allows(program: tuple[str, ...]) -> bool:
    """The nearest setting holds, the last of several."""
    said = dict(SETTINGS[statement] for statement in program)
    return next((said[of] for of in ("matmul", "cuda", "all") if of in said), False)


@pytest.fixture(scope="module")
def found() -> dict:
    return printed_by("-W", "ignore", "-m", "tests.kernels.launching.tf32_checks")


@pytest.mark.parametrize("program", PROGRAMS, ids="; ".join)
def test_products_are_told_what_the_settings_say(found, program):
    found = found["; ".join(program)]
    assert found.get("error") is None
    precision = "tf32" if allows(program) else "tf32x3"
    # Each is launched anew, then from its plan.
    assert found["before"] == [["tf32x3", True], ["tf32x3", False]]
    assert found["after"][0][0] == precision and found["after"][1] == [precision, False]
    if precision == "tf32":
        assert found["after"][0] == ["tf32", True]


@pytest.mark.parametrize("program", PROGRAMS, ids="; ".join)
def test_commands_compare_with_convolutions_of_float32(found, program):
    """And leave matrix products as the user wants them, and no setting that can't be read."""
    found = found["; ".join(program)]
    assert found.get("error") is None
    assert found["convolutions"] == "ieee" and not found["allow_tf32"]
    assert found["matrices"] == allows(program)
