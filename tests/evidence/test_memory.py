"""The kernels' own loads and stores: no more than the design promises, and each as its tiling explains."""

import pytest
import torch
import triton
import triton.language as tl

from deit_fast import ops
from evidence.access_counter import counting
from evidence.memory import TOLERANCE, count_block, explained, problems, promised, report, summed
from evidence.tilings import explanations

# 198 = 3 · 64 + 6 leaves tails in every tile; 70 and 102 are quicker.
HEAD_DIM = 64


@pytest.mark.parametrize(
    ("width", "tokens", "training", "precision", "launches"),
    [
        (192, 70, False, "bf16", 7),
        (256, 70, False, "autocast-bf16", 7),
        (448, 70, False, "bf16", 7),
        (64, 198, True, "bf16", 23),
        (192, 70, True, "autocast-bf16", 25),
    ],
)
def test_a_block_moves_what_is_promised_and_its_tilings_explain(width, tokens, training, precision, launches):
    counts = count_block(width, width // HEAD_DIM, tokens, 1, training=training, precision=precision)
    assert problems(counts, tokens * width, promised(training, precision)) == []
    assert sum(len(call.launches) for call in counts.calls) == launches


def test_inference_moves_its_boundary_bytes_once_and_between_them_normalised_rows_alone():
    counts = count_block(448, 7, 20, 1, training=False)
    block = summed(counts.calls, "tokens")
    assert block.once == block.boundary and block.again == 0
    # Of both branches, written and read, two bytes each.
    assert block.between == 2 * 2 * 2 * 448 * 20


def test_launches_that_are_not_run_count_the_same_distinct_bytes():
    run, recorded = (count_block(64, 1, 70, 1, training=True, execute=execute) for execute in (True, False))
    assert summed(run.calls, "tokens") == summed(recorded.calls, "tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_separate_projections_are_explained(dtype, triton_backend):
    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    x, norm_weight, norm_bias = leaf(1, 70, 64), leaf(64), leaf(64)
    weights, biases = ([leaf(*shape) for _ in range(3)] for shape in ((64, 64), (64,)))
    with counting(tokens=70) as counts:
        heads = ops.layer_norm_linear(x, norm_weight, norm_bias, 1e-6, weights, biases)
        out, _ = ops.attention([each.unflatten(-1, (1, 64)) for each in heads], 0.125)
        out.sum().backward()
    launches = [launch for call in counts.calls for launch in call.launches]
    assert [launch.kernel for launch in launches][:3] == ["layer_norm_kernel", "linear_kernel", "attention_kernel"]
    for launch in launches:
        reasons = explanations(launch)
        assert [a for a in launch.accesses if not explained(a, reasons[a.name])] == []
    assert counts.not_written_once == []


def test_the_report_is_printed_and_finds_nothing_wrong(capsys):
    assert not report("tiny", 1, training=False, precision="bf16")
    printed = capsys.readouterr().out
    assert "| layer_norm_kernel | x | 198×192 bfloat16 | 76032 |" in printed
    assert "promised: 52" in printed


# The counter itself -------------------------------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, y_ptr, length, offset, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for _ in range(REPEAT):
        x = tl.load(x_ptr + i, mask=i < length)
        tl.store(y_ptr + offset + i, x, mask=i < length)


@triton.jit
def parking_kernel(y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, 1.0)
    tl.store(y_ptr + i, tl.load(y_ptr + i) + 1.0)


@triton.jit
def atomic_kernel(x_ptr):
    tl.atomic_add(x_ptr, 1.0)


def copy(x: torch.Tensor, y: torch.Tensor, length: int, repeat: int = 1, offset: int = 0):
    with counting(tokens=7) as counts:
        copy_kernel[(1,)](x, y, length, offset, REPEAT=repeat, BLOCK=16)
    (call,) = counts.calls
    (launch,) = call.launches
    return launch.accesses, counts.not_written_once


def test_masked_lanes_do_not_count():
    (x, y), wrong = copy(torch.zeros(20), torch.zeros(10), 10)
    assert (x.name, x.size, x.loaded, x.distinct_loaded, x.stored) == ("x", 80, 40, 40, 0)
    assert (y.name, y.size, y.loaded, y.stored, y.distinct_stored) == ("y", 40, 0, 40, 40)
    assert wrong == []


def test_an_element_loaded_again_counts_again():
    (x, _), _ = copy(torch.zeros(10), torch.zeros(10), 10, repeat=3)
    assert x.loaded == 3 * x.distinct_loaded == 3 * 40
    assert not explained(x, (2, "twice"))
    assert explained(x, (3 + TOLERANCE, "three times"))


def test_an_element_never_written_or_written_twice_is_found():
    assert "written 0 to 1 times" in copy(torch.zeros(10), torch.zeros(10), 9)[1][0]
    assert "written 2 to 2 times" in copy(torch.zeros(10), torch.zeros(10), 10, repeat=2)[1][0]


def test_what_a_launch_parks_in_its_outputs_place_is_no_second_writing():
    y = torch.zeros(16)
    with counting(tokens=7) as counts:
        parking_kernel[(1,)](y, BLOCK=16)
    (access,) = counts.calls[0].launches[0].accesses
    assert access.stored == 2 * access.loaded == 128
    assert explained(access, (1, "once"))
    assert counts.not_written_once == []


def test_slices_of_one_tensor_are_told_apart():
    packed = torch.zeros(20)
    (x, y), _ = copy(packed[:10], packed[10:], 10)
    assert (x.loaded, x.stored, y.loaded, y.stored) == (40, 0, 0, 40)


def test_an_access_outside_the_tensors_is_an_error():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="stores outside"):
        copy(torch.zeros(10), torch.zeros(10), 10, offset=2**20)


def test_an_atomic_operation_is_an_error():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="atomic"), counting(tokens=7):
        atomic_kernel[(1,)](torch.zeros(1))
