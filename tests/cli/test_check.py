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
import reference
import reference.loss
from deit_fast import ops
from deit_fast.cli import check, check_cases, check_environment
from deit_fast.cli.check_cases import DEIT_SIZES, INTERPRETER_SIZES, OPS, cases
from deit_fast.cli.main import main
from deit_fast.kernels import launch
from deit_fast.ops import backend

CPU = torch.device("cpu")
IN_FLOAT64 = [(op, i) for op in OPS for i in range(len(list(cases(op, INTERPRETER_SIZES[0], torch.float32, CPU))))]


@triton.jit
def forgetful_normalise(x, mean, rstd, weight_ptr, bias_ptr, columns, mask):
    """Leaves weight and bias out."""
    return (x - mean[:, None]) * rstd[:, None]


def refuse(monkeypatch, *names: str) -> None:
    """The kernels called `names` do not launch."""
    run = launch.run

    def refusing(kernel, *args, **options):
        if kernel.__name__ in names:
            raise triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory")
        run(kernel, *args, **options)

    monkeypatch.setattr(launch, "run", refusing)


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
        (dtype, tensor) for dtype in ("float32", "float16") for tensor in ("output 0", "output 1", "d qkv")
    }
    for line in report["lines"]:
        assert 0 < line["error"]["relative"] <= line["allowed"]["relative"] < 1e-2
        assert line["failure"] is line["traceback"] is None


def test_a_wrong_kernel_fails_the_check_and_is_named(capsys, monkeypatch):
    monkeypatch.setattr("deit_fast.kernels.layer_norm.normalise", forgetful_normalise)
    assert main(["check", "--op", "layer_norm", "--op", "attention"]) == 1
    out = capsys.readouterr().out
    failed = [line for line in out.splitlines() if line.startswith("FAILED")]
    assert [line.split(":")[0] for line in failed] == [
        f"FAILED layer_norm (batch 4, 18 tokens, width 64), {dtype}, output" for dtype in ("float32", "float16")
    ]
    assert all("less accurate than stock: relative error 0.1" in line for line in failed)
    assert "2 of 14 results failed." in out


def test_a_kernel_that_does_not_launch_fails_in_every_dtype_and_the_rest_is_checked(capsys, monkeypatch):
    refuse(monkeypatch, "layer_norm_kernel")
    assert main(["check", "--op", "layer_norm", "--op", "attention", "--json"]) == 1
    report = printed_json(capsys)
    failed = [line for line in report["lines"] if line["failure"]]
    assert [(line["op"], line["dtype"]) for line in failed] == [("layer_norm", "float32"), ("layer_norm", "float16")]
    for line in failed:
        assert line["failure"].startswith("OutOfResources: out of resource: shared memory, Required: 300000")
        assert "in refusing" in line["traceback"]
    assert len(report["lines"]) == 2 + 6
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


@pytest.mark.parametrize(
    ("ours", "again", "failure"),
    [
        ([1.0, 2.0], [1.0, 2.0], None),
        ([1.0, 2.0], [1.0, 2.0000002], "other bits in a second run"),
        ([1.0, 2.1], [1.0, 2.1], "less accurate than stock: relative error 0.045 (stock 0, allowed"),
        ([1.0, torch.nan], [1.0, torch.nan], "other NaN or infinity than float64"),
        ([1.0], [1.0], "torch.float32 [1] where stock has torch.float32 [2]"),
    ],
)
def test_what_makes_a_line_fail(ours, again, failure):
    exact = torch.tensor([1.0, 2.0])
    found = check.compare(torch.tensor(ours), torch.tensor(again), exact, exact.double())
    assert found.get("failure") is failure or found["failure"].startswith(failure)


def test_infinity_is_right_where_float64_has_it_whatever_stock_has():
    exact = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    stock = torch.tensor([1.0, torch.nan])
    assert "failure" not in check.compare(exact.float(), exact.float(), stock, exact)
    assert check.compare(stock, stock, stock, exact)["failure"] == "other NaN or infinity than float64"


def test_indices_must_be_equal():
    right, wrong = torch.tensor([2, 0, 1]), torch.tensor([2, 1, 0])
    assert "failure" not in check.compare(right, right, right, right.double())
    assert "less accurate" in check.compare(wrong, wrong, right, right.double())["failure"]


# What it computes ----------------------------------------------------------------------------------------------------


def test_every_operator_is_checked():
    operators = {name.removesuffix("_branching") for name in ops.__all__}
    assert set(OPS) == operators - {"known_count"}


def test_a_gpu_is_checked_at_the_shapes_of_deit():
    assert [(size.width, size.heads, size.tokens) for size in DEIT_SIZES] == [
        (192, 3, 198),
        (384, 6, 198),
        (768, 12, 198),
    ]


def reference_of(case: check_cases.Case):
    """The same in `reference/`, of the same named arguments; None where it has no counterpart."""
    if case.op == "readout_attention":

        def unpacked(weight, bias, **rest):
            q, k, v = weight.chunk(3)
            q_bias, _, v_bias = bias.chunk(3)
            named = {"q_weight": q, "q_bias": q_bias, "k_weight": k, "v_weight": v, "v_bias": v_bias}
            return reference.readout_attention(**named, **rest), rest["x"][:, : rest["readout_rows"]]

        return unpacked
    if case.op == "readout_attention_qkv":
        return lambda k_bias, **rest: (
            reference.readout_attention(**rest) + 0 * k_bias.sum(),
            rest["x"][:, : rest["readout_rows"]],
        )
    if case.title.startswith("and the residual"):
        return lambda x, **rest: (*reference.layer_norm_qkv(x, **rest), x)
    if case.op == "keep_samples":

        def block(x, norm_weight, norm_bias, eps, layer_scale, drop_path_scale, qkv_weight, qkv_bias, **rest):
            norm = (norm_weight, norm_bias, eps)
            qkv = reference.layer_norm_linear(x, *norm, qkv_weight, qkv_bias)
            heads = INTERPRETER_SIZES[0].heads
            out, _ = reference.attention(qkv.unflatten(-1, (3, heads, -1)), INTERPRETER_SIZES[0].scale)
            projection = rest.pop("proj_weight"), rest.pop("proj_bias")
            x = reference.linear_residual(out, *projection, x, layer_scale, drop_path_scale)
            y = reference.mlp(x, *norm, **rest, layer_scale=layer_scale, drop_path_scale=drop_path_scale)
            return ops.keep_samples(drop_path_scale), y

        return block
    if case.op.startswith("attention"):

        def without_log_sum_exp_gradient(**arguments):
            out, log_sum_exp = getattr(reference, case.op)(**arguments)
            return out, log_sum_exp.detach()

        return without_log_sum_exp_gradient
    return reference.loss.distillation_loss if case.op == "distillation_loss" else getattr(reference, case.op)


@pytest.mark.parametrize(("op", "index"), IN_FLOAT64)
def test_its_truth_is_the_reference_in_float64(op, index):
    """`reference/` is not installed with the package: the stock operators answer for it, in float64."""
    case = list(cases(op, INTERPRETER_SIZES[0], torch.float32, CPU))[index]
    found = check.evaluate(case, torch.float32, "torch", double=True)
    expected = check.evaluate(replace(case, function=reference_of(case)), torch.float32, "torch", double=True)
    assert list(found) == list(expected)
    for name, ours in found.items():
        assert ours.dtype is expected[name].dtype
        torch.testing.assert_close(ours, expected[name], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("size", DEIT_SIZES, ids=lambda size: str(size.width))
def test_the_cases_at_a_models_shapes_run(op, size):
    for case in cases(op, replace(size, batch=1), torch.bfloat16, CPU):
        found = check.evaluate(case, torch.bfloat16, "torch")
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert len(found) > len(case.differentiable)


# Where it runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in_gpu(monkeypatch) -> torch.device:
    """What asks for a GPU gets answers; tensors stay on the CPU, and kernels in the interpreter."""
    properties = SimpleNamespace(
        name="Stand-in", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132, gcnArchName="gfx942"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(check, "interpreted", lambda: False)
    monkeypatch.setattr(check, "find_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(check, "run_tasks", check.run_tasks_here)
    monkeypatch.setattr(check, "make_current", lambda device: None)
    monkeypatch.setattr(check, "cases", lambda op, size, dtype, device: cases(op, size, dtype, CPU))
    small = tuple(replace(size, batch=1, image=32) for size in DEIT_SIZES[:2])
    monkeypatch.setattr(check, "DEIT_SIZES", small)
    monkeypatch.setattr(
        check_environment.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="580.95.05\n580.95.05\n")
    )
    return torch.device("cuda", 0)


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
        for done in check.run_tasks_here(function, tasks, heard):
            ended = done.task.size.width == 192 and done.task.dtype is torch.float16
            yield replace(done, result=check.Failed("its process ended: killed by SIGSEGV", "core")) if ended else done

    monkeypatch.setattr(check, "run_tasks", in_processes)
    assert main(["check", "--op", "layer_norm", "--json"]) == 1
    lines = printed_json(capsys)["lines"]
    (failed,) = (line for line in lines if line["failure"])
    assert (failed["case"], failed["dtype"]) == ("batch 1, 6 tokens, width 192", "float16")
    assert (failed["failure"], failed["traceback"]) == ("its process ended: killed by SIGSEGV", "core")
    assert len(lines) == 1 + 5 * 4


def test_what_stock_operators_answer_by_design_is_no_failure_and_is_told_apart(capsys, monkeypatch):
    monkeypatch.setattr(launch, "no_products", lambda weight: "the abacus has no matrix instructions")
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


def test_an_amd_gpu_is_described_by_its_own_names(monkeypatch, stand_in_gpu):
    monkeypatch.setattr(torch.version, "hip", "7.2")
    found = check_environment.environment(stand_in_gpu)
    assert "gfx942" in found["device"] and "ROCm 7.2" in found["torch"]
    assert found["driver"] == "unknown" or found["driver"].startswith("amdgpu ")


@pytest.mark.parametrize("error", [FileNotFoundError("nvidia-smi"), subprocess.TimeoutExpired("nvidia-smi", 30)])
def test_a_driver_that_does_not_say_its_version_is_unknown(monkeypatch, stand_in_gpu, error):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(check_environment.subprocess, "run", failing)
    assert check_environment.environment(stand_in_gpu)["driver"] == "unknown"


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
    monkeypatch.setattr(check, "version", {"triton": triton_version, "numpy": numpy_version}.get)
    monkeypatch.setattr(check, "print_tables", lambda *_: 0)
    assert main(["check"]) == (0 if works else 2)
    assert ("Triton 3.6's interpreter needs numpy before 2.4" in capsys.readouterr().err) is not works


def test_a_missing_rich_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["check"]) == 2
    assert "deit_fast[cli]" in capsys.readouterr().err
