"""The stand-in driver compiles what the product would launch, and hides no fault."""

import pytest

from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from tests.support.compiled import printed_by


@pytest.fixture(scope="module")
def seen() -> dict:
    return printed_by("-m", "tests.check.standin_checks")


@pytest.mark.parametrize(
    ("target", "binary", "instruction"),
    [
        ("sm_80", "cubin", "mma.sync"),
        ("sm_90", "cubin", "wgmma.mma_async"),
        ("sm_100", "cubin", "tcgen05.mma"),
        ("gfx942", "hsaco", "v_mfma"),
        ("gfx1200", "hsaco", "v_wmma"),
    ],
)
def test_a_launch_on_cpu_tensors_is_compiled_for_the_target(seen, target, binary, instruction):
    first, second = seen[target]
    assert first == second
    assert first["target"] == target
    assert first["binary"] == binary
    assert list(first["tensor_core"]) == [instruction]
    assert first["dots"] == 1
    assert first["scalar_dots"] == 0
    assert 16 < first["registers"] <= TARGETS[target].registers
    assert 0 < first["shared_memory"] <= TARGETS[target].shared_memory
    assert first["spilled"] == 0
    assert first["widest_store"] in (8, 16)


def test_a_launch_is_recorded_with_its_arguments(seen):
    launch = seen["sm_90"][0]
    assert launch["kernel"] == "product_kernel"
    assert launch["grid"] == [3, 2, 1]
    assert launch["tensors"]["a_ptr"] == [[64, 256], "torch.bfloat16"]
    assert launch["tensors"]["c_ptr"] == [[64, 64], "torch.bfloat16"]
    assert launch["scalars"] == {"K": 256}
    assert launch["metadata"] == {"name": "product of 256", "flops16": 2 * 64 * 256}
    assert launch["constexprs"] == {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}


def test_equal_launches_have_one_key(seen):
    assert seen["keys"] == 1


def test_a_kernel_that_does_not_compile_is_recorded_and_the_next_goes_on(seen):
    faulty, *others = seen["faults"]
    assert faulty["kernel"] == "faulty_kernel"
    assert "power of 2" in faulty["error"]
    assert [launch["kernel"] for launch in others] == ["product_kernel", "product_kernel"]


def test_too_much_shared_memory_is_recorded(seen):
    assert seen["faults"][1]["shared_memory"] > TARGETS["sm_90"].shared_memory


def test_spills_are_counted(seen):
    assert seen["faults"][2]["registers"] == 96
    assert seen["faults"][2]["spilled"] > 0


def test_a_16_bit_dot_without_tensor_cores_is_counted(seen):
    (launch,) = seen["scalar"]
    assert launch["scalar_dots"] == 1
    assert launch["tensor_core"] == {}


def test_the_driver_is_put_back(seen):
    assert seen["restored"]


def test_recording_refuses_the_interpreter():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), recording(TARGETS["sm_90"]):
        pass
