"""`deit-fast check`: right kernels pass, wrong ones are named, and no mistake of a user ends in a traceback."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

import deit_fast
from deit_fast.check import environment, operators
from deit_fast.check.cases import DEIT_SIZES, INTERPRETER_SIZES, cases
from deit_fast.cli import check
from deit_fast.cli.main import main
from deit_fast.kernels.launching import hardware, run
from deit_fast.ops import backend
from tests.support.described_gpu import describe_one

CPU = torch.device("cpu")


@triton.jit
def forgetful_normalise(x, mean, rstd, weight_ptr, bias_ptr, columns, mask):
    """Leaves weight and bias out."""
    return (x - mean[:, None]) * rstd[:, None]


def refuse(monkeypatch, *names: str) -> None:
    """The kernels called `names` do not launch."""
    stock = run.run

    def refusing(kernel, *args, **options):
        if kernel.__name__ in names:
            raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")
        stock(kernel, *args, **options)

    monkeypatch.setattr(run, "run", refusing)


def printed_json(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


# What it says --------------------------------------------------------------------------------------------------------


def test_right_kernels_pass_and_each_output_and_gradient_is_listed(capsys):
    assert main(["check", "--op", "layer_norm", "--op", "distillation_loss"]) == 0
    out, err = capsys.readouterr()
    for text in (
        triton.__version__,
        torch.__version__,
        deit_fast.__version__,
        "layer_norm: batch 4",
        "distillation_loss: ",
    ):
        assert text in out
    for tensor in ("output", "d x", "d weight", "d bias", "d logits", "d dist_logits"):
        assert f"\n {tensor} " in out
    assert "bfloat16 skipped: Triton's interpreter computes bfloat16 wrongly." in out
    assert "All 20 results are as accurate as stock PyTorch's, and the same bits in a second run." in out
    assert not err


def test_json_has_the_errors_and_what_stock_has(capsys):
    assert main(["check", "--op", "attention", "--json"]) == 0
    report = printed_json(capsys)
    assert report["passed"] and report["environment"]["Triton"] == triton.__version__
    assert list(report["skipped"]) == ["bfloat16"]
    assert {(line["dtype"], line["tensor"]) for line in report["lines"]} == {
        (dtype, tensor)
        for dtype in ("float32", "float16")
        for tensor in ("output 0", "output 1", "d qkv[0]", "d qkv[1]", "d qkv[2]")
    }
    for line in report["lines"]:
        assert 0 < line["error"]["relative"] <= line["allowed"]["relative"] < 1e-2
        assert line["failure"] is line["traceback"] is None


def test_a_wrong_kernel_fails_the_check_and_is_named(capsys, monkeypatch):
    monkeypatch.setattr("deit_fast.kernels.layer_norm.forward.normalise", forgetful_normalise)
    assert main(["check", "--op", "layer_norm", "--op", "attention"]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert [line.split(":")[0] for line in failed] == [
        f"FAILED layer_norm (batch 4, 18 tokens, width 64), {dtype}, output" for dtype in ("float32", "float16")
    ]
    assert all("less accurate than stock: relative error 0.1" in line for line in failed)
    assert "2 of 24 results failed." in out


def test_a_kernel_that_does_not_launch_fails_in_every_dtype_and_the_rest_is_checked(capsys, monkeypatch):
    refuse(monkeypatch, "layer_norm_kernel")
    assert main(["check", "--op", "layer_norm", "--op", "attention", "--json"]) == 1
    report = printed_json(capsys)
    failed = [line for line in report["lines"] if line["failure"]]
    assert [(line["op"], line["dtype"]) for line in failed] == [("layer_norm", "float32"), ("layer_norm", "float16")]
    for line in failed:
        assert line["failure"].startswith("OutOfResources: out of resource: shared memory, Required: 300000")
        assert "in refusing" in line["traceback"]
    assert len(report["lines"]) == 2 + 2 * (3 + 5)
    assert not backend.failed, "the next dtype would not be tried"


def test_a_kernel_that_failed_before_the_check_fails_it_all_the_same(capsys, monkeypatch):
    refuse(monkeypatch, "layer_norm_kernel")
    (case,) = cases("layer_norm", INTERPRETER_SIZES[0], torch.float32, CPU)
    with backend.forced("triton"), pytest.warns(UserWarning, match="its kernels failed"):
        case.function(**case.arguments)
    assert main(["check", "--op", "layer_norm", "--json"]) == 1
    outcomes = {line["dtype"]: line["failure"] for line in printed_json(capsys)["lines"] if line["failure"]}
    assert outcomes.keys() == {"float32", "float16"} and all("OutOfResources" in each for each in outcomes.values())


def test_a_backward_that_does_not_launch_is_named_too(capsys, monkeypatch):
    refuse(monkeypatch, "layer_norm_backward_kernel")
    assert main(["check", "--op", "layer_norm"]) == 1
    out = capsys.readouterr().out
    assert "FAILED layer_norm (batch 4, 18 tokens, width 64), float32, all of it: OutOfResources" in out


# Where it runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in_gpu(monkeypatch) -> torch.device:
    """What asks for a GPU gets answers; tensors stay on the CPU, and kernels in the interpreter."""
    device = describe_one(monkeypatch)
    for module in (check, operators):
        monkeypatch.setattr(module, "interpreted", lambda: False)
    monkeypatch.setattr(check, "find_device", lambda name: device)
    monkeypatch.setattr(operators, "run_tasks", operators.run_tasks_here)
    monkeypatch.setattr(operators, "make_current", lambda device: None)
    monkeypatch.setattr(operators, "cases", lambda op, size, dtype, device: cases(op, size, dtype, CPU))
    small = tuple(replace(size, batch=1, tokens=6, grid=(2, 2)) for size in DEIT_SIZES[:2])
    monkeypatch.setattr(operators, "DEIT_SIZES", small)
    return device


def test_on_a_gpu_every_dtype_runs_at_a_models_shapes(capsys, stand_in_gpu):
    assert main(["check", "--op", "layer_norm"]) == 0
    out = capsys.readouterr().out
    assert "device:    Stand-in, sm_90, 80.0 GiB, 132 multiprocessors\ndriver:    NVIDIA 580.95.05\n" in out
    assert "skipped" not in out and "interpreter" not in out
    for text in ("width 192\n", "width 384\n", "6 tokens", "float32", "float16", "bfloat16", "All 24 results"):
        assert text in out
    assert max(map(len, out.splitlines())) <= 100


def test_a_case_that_the_width_does_not_change_runs_once(capsys, stand_in_gpu):
    assert main(["check", "--op", "distillation_loss", "--json"]) == 0
    report = printed_json(capsys)
    assert report["skipped"] == {}
    assert [line["case"] for line in report["lines"]] == ["hard, batch 1, 1000 classes"] * 9 + [
        "soft, batch 1, 1000 classes"
    ] * 9


def test_a_case_that_ends_its_process_fails_and_the_others_are_checked(capsys, monkeypatch, stand_in_gpu):
    def in_processes(function, tasks, heard):
        for done in operators.run_tasks_here(function, tasks, heard):
            ended = done.task.size.width == 192 and done.task.dtype is torch.float16
            yield (
                replace(done, result=operators.Failed("its process ended: killed by SIGSEGV", "core"))
                if ended
                else done
            )

    monkeypatch.setattr(operators, "run_tasks", in_processes)
    assert main(["check", "--op", "layer_norm", "--json"]) == 1
    lines = printed_json(capsys)["lines"]
    (failed,) = (line for line in lines if line["failure"])
    assert (failed["case"], failed["dtype"]) == ("batch 1, 6 tokens, width 192", "float16")
    assert (failed["failure"], failed["traceback"]) == ("its process ended: killed by SIGSEGV", "core")
    assert len(lines) == 1 + 5 * 4


def test_what_stock_operators_answer_by_design_is_no_failure_and_is_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(hardware, "no_products", lambda weight: "the abacus has no matrix instructions")
    assert main(["check", "--op", "linear", "--op", "layer_norm"]) == 0
    out = capsys.readouterr().out
    said = "the abacus has no matrix instructions; using the stock PyTorch operators"
    assert f"STOCK deit_fast.linear: {said}" in out and f"STOCK deit_fast.linear_backward: {said}" in out
    assert "FAILED" not in out and "10 of them are of stock operators, for the reasons above." in out
    assert main(["check", "--op", "linear", "--op", "layer_norm", "--json"]) == 0
    report = printed_json(capsys)
    assert report["passed"]
    outcomes = {(line["op"], line["outcome"]) for line in report["lines"]}
    assert outcomes == {("linear", "stock"), ("layer_norm", "passed")}


@pytest.mark.parametrize("code", [0, 1])
def test_without_a_gpu_it_starts_itself_in_the_interpreter(monkeypatch, code):
    started = []

    def run(command, env):
        started.append((command, env))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(check, "interpreted", lambda: False)
    monkeypatch.setattr(check.subprocess, "run", run)
    assert main(["check", "--device", "cpu", "--json", "--op", "linear", "--op", "mlp"]) == code
    ((command, env),) = started
    arguments = ["check", "--device", "cpu", "--json", "--op", "linear", "--op", "mlp"]
    assert command == [sys.executable, "-m", "deit_fast.cli.main", *arguments]
    assert env["TRITON_INTERPRET"] == "1"


def test_the_installed_command_needs_nothing_but_the_package(tmp_path):
    """From another folder, and without TRITON_INTERPRET."""
    code = "import sys; from deit_fast.cli.main import main; sys.exit(main(['check', '--op', 'distillation_loss']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "All 12 results" in done.stdout


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "paint"], "invalid choice: 'paint'"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--device", "meta"], "--device meta cannot be checked: the kernels are for cuda"),
    ],
)
def test_a_mistake_is_one_clear_error(capsys, arguments, message):
    try:
        code = main(["check", *arguments])
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    out, err = capsys.readouterr()
    assert message in err and "Traceback" not in err and not out


def test_a_gpu_and_the_interpreter_exclude_each_other(capsys, monkeypatch):
    monkeypatch.setattr(check, "find_device", lambda name: torch.device("cuda", 0))
    assert main(["check"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.0", False), ("3.7.1", "2.4.6", True), ("3.10.0+git1", "2.10.1", True)],
)
def test_an_interpreter_that_cannot_run_with_this_numpy_is_no_kernels_fault(
    capsys, monkeypatch, triton_version, numpy_version, works
):
    monkeypatch.setattr(environment, "version", {"triton": triton_version, "numpy": numpy_version}.get)
    monkeypatch.setattr(check, "print_tables", lambda *_: 0)
    assert main(["check"]) == (0 if works else 2)
    assert ("Triton 3.6's interpreter needs numpy before 2.4" in capsys.readouterr().err) is not works


def test_a_missing_rich_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["check"]) == 2
    assert "deit_fast[cli]" in capsys.readouterr().err
