"""Kernels that do not compile or launch: the stock operators answer, once and for all, and a warning says so."""

import warnings

import pytest
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from deit_fast import ops
from deit_fast.kernels.launching import run
from deit_fast.ops import backend
from deit_fast.swap import SwapReport
from tests.ops.test_dispatch import samples
from tests.support.examples import public, tensors

FAILURES = [
    OutOfResources(300_000, 101_376, "shared memory"),
    CompilationError("def kernel():\n  oops", None, "a planted fault"),
    PTXASError("Internal Triton PTX codegen error"),
    RuntimeError("Triton Error [CUDA]: invalid argument"),
    FileNotFoundError(2, "No such file or directory", "gcc"),
]


pytestmark = pytest.mark.usefixtures("triton_backend")


def failed_operators() -> list[str]:
    return [failure.op for failure in backend.failed.values()]


class Launches:
    """Stands in for `run.run`: raises `error` at the kernels whose names `chosen` accepts, and counts these."""

    def __init__(self, monkeypatch, error: BaseException, chosen=lambda kernel: True) -> None:
        self.refused: list[str] = []
        stock = run.run

        def refusing(kernel, *args, **options):
            if chosen(kernel.__name__):
                self.refused.append(kernel.__name__)
                raise error
            stock(kernel, *args, **options)

        monkeypatch.setattr(run, "run", refusing)


def gradients(name: str, arguments: tuple) -> list[Tensor]:
    """The outputs, and the gradients of what requires them."""
    inputs = [t for t in tensors(arguments) if t.requires_grad]
    outputs = public(name)(*arguments)
    outputs = [o for o in ([outputs] if isinstance(outputs, Tensor) else outputs) if o.requires_grad]
    found = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    return [*(o.detach() for o in outputs), *found]


def stock(name: str, arguments: tuple) -> list[Tensor]:
    with backend.forced("torch"):
        return gradients(name, arguments)


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def warned_operators(caught) -> list[str]:
    messages = [str(w.message) for w in caught]
    assert all("output of: deit-fast check" in message for message in messages)
    return [message.removeprefix("deit_fast.").split(":")[0] for message in messages]


@pytest.mark.parametrize("name", samples(requires_grad=True))
def test_an_operator_whose_kernels_fail_falls_back_once_forward_and_backward(name, monkeypatch) -> None:
    arguments = samples(requires_grad=True)[name]
    launches = Launches(monkeypatch, FAILURES[0])
    with pytest.warns(UserWarning) as caught:
        assert_equal(gradients(name, arguments), stock(name, arguments))
    warned = warned_operators(caught)
    assert name.partition(",")[0] in warned and any(op.endswith("_backward") for op in warned)
    assert sorted(warned) == sorted(set(warned)) == sorted(failed_operators())

    refused = len(launches.refused)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(gradients(name, arguments), stock(name, arguments))
    assert len(launches.refused) == refused, "tried again"


@pytest.mark.parametrize("name", samples(requires_grad=True))
def test_a_backward_that_fails_halfway_starts_over_on_the_stock_operators(name, monkeypatch) -> None:
    """Its first kernel runs, its second, if it has one, fails; the forward's have run and stay in use."""
    arguments = samples(requires_grad=True)[name]
    expected = stock(name, arguments)
    public(name)(*arguments)
    forward: list[str] = []
    Launches(monkeypatch, FAILURES[0], lambda kernel: forward.append(kernel))
    public(name)(*arguments)
    seen: list[str] = []

    def second_of_backward(kernel: str) -> bool:
        seen.append(kernel)
        return len(seen) == len(forward) + 2

    launches = Launches(monkeypatch, FAILURES[0], second_of_backward)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gradients(name, arguments)
    assert warned_operators(caught) == failed_operators()
    assert name.partition(",")[0] not in failed_operators()
    assert len(backend.failed) == len(launches.refused) == (len(seen) >= len(forward) + 2)
    # Their softmax is all but one-hot, and some gradients all but nothing.
    scale = max(stocks.norm() for stocks in expected)
    for ours, stocks in zip(found, expected, strict=True):
        assert (ours - stocks).norm() <= 1e-4 * scale


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_the_warning_names_the_operator_and_the_reason_in_a_line(error, monkeypatch) -> None:
    Launches(monkeypatch, error)
    x, *rest = samples()["layer_norm"]
    with pytest.warns(UserWarning) as caught:
        ops.layer_norm(x, *rest)
    (message,) = (str(w.message) for w in caught)
    assert "\n" not in message
    assert message.startswith("deit_fast.layer_norm: its kernels failed")
    assert type(error).__name__ in message
    assert str(error).strip().splitlines()[-1].strip() in message


def test_the_failure_of_one_operator_leaves_the_others_on_their_kernels(monkeypatch) -> None:
    launches = Launches(monkeypatch, FAILURES[0], lambda kernel: kernel == "layer_norm_kernel")
    with pytest.warns(UserWarning):
        ops.layer_norm(*samples()["layer_norm"])
    ops.attention(*samples()["attention"])
    assert failed_operators() == ["layer_norm"]
    assert launches.refused == ["layer_norm_kernel"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        KeyboardInterrupt(),
        SystemExit(3),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_a_kernel_goes_through(error, monkeypatch) -> None:
    launches = Launches(monkeypatch, error)
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            ops.layer_norm(*samples()["layer_norm"])
        assert caught.value is error
    assert len(launches.refused) == 2 and not backend.failed


def test_wrong_arguments_are_the_users_error_and_no_failure(monkeypatch) -> None:
    x, weight, *rest = samples()["layer_norm"]
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.layer_norm(x, weight[:-1], *rest)
    assert not backend.failed


def test_the_report_lists_operators_whose_kernels_have_failed(monkeypatch) -> None:
    Launches(monkeypatch, FAILURES[0])
    report = SwapReport(swapped=["norm"], classes={"norm": "LayerNorm"})
    assert "failed" not in str(report)
    with pytest.warns(UserWarning):
        ops.layer_norm(*samples()["layer_norm"])
    said = "\nkernels of layer_norm failed for batch 2, x=5x32fp32 weight bias on cpu, stock operators run: OutOfRes"
    assert said in str(report)


def test_another_shape_is_tried_anew_and_what_failed_alike_is_not_said_again(monkeypatch) -> None:
    x, *rest = samples()["layer_norm"]
    launches = Launches(monkeypatch, FAILURES[0])
    with pytest.warns(UserWarning):
        ops.layer_norm(x, *rest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.layer_norm(x[:1], *rest)
    assert len(launches.refused) == 2
    monkeypatch.undo()
    with backend.fallbacks() as heard:
        ops.layer_norm(x, *rest)
        assert len(heard) == 1, "the shape that failed is left to the stock operators"
        ops.layer_norm(torch.cat((x, x)), *rest)
    assert len(heard) == 1, "a shape that did not fail runs its kernels"


BROKEN = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("error", FAILURES[3:4])
def test_a_device_that_an_earlier_kernel_broke_is_told_of_as_that(error, monkeypatch) -> None:
    monkeypatch.setattr(backend, "device_error", lambda error, device: BROKEN)
    launches = Launches(monkeypatch, error)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(torch.AcceleratorError) as caught:
                ops.layer_norm(*samples()["layer_norm"])
        assert caught.value is BROKEN and caught.value.__cause__ is error
    assert len(launches.refused) == 2 and not backend.failed


def test_a_device_is_asked_whether_it_still_answers(monkeypatch) -> None:
    gpu, asked = torch.device("cuda", 1), []

    def synchronize(device) -> None:
        asked.append(device)
        if broken:
            raise BROKEN

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for broken in (False, True):
        assert backend.device_error(FAILURES[3], gpu) is (BROKEN if broken else None)
    assert asked == [gpu, gpu]
    assert backend.device_error(FAILURES[3], torch.device("cpu")) is None


def test_while_a_graph_is_captured_the_drivers_errors_go_through_and_the_compilers_do_not(monkeypatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: pytest.fail("synchronised in a capture"))
    assert backend.device_error(FAILURES[3], gpu) is FAILURES[3]
    assert backend.device_error(FAILURES[0], gpu) is None
