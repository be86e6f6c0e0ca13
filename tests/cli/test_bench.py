import itertools
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from deit_fast.benchmark import measure, profile
from deit_fast.benchmark.clock import CpuClock
from deit_fast.benchmark.contenders import CONTENDERS, ModelCase
from deit_fast.benchmark.results import Results
from deit_fast.cli import bench
from deit_fast.cli.main import main

SMALL = [
    "--suite",
    "model",
    "--models",
    "deit_tiny_distilled_patch16_224",
    "--img-size",
    "32",
    "--batch",
    "2",
    "--rounds",
    "1",
]


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """timm's models with one block."""
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, depth=1, **options))


def test_it_writes_every_form_of_what_it_measured(tmp_path, capsys):
    arguments = ["bench", "--suite", "train", *SMALL, "--peers", "timm;deit_fast"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    names = {"results.json", "results.csv", "results.md", "throughput-inference.png", "throughput-training.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(row["contender"], row["case"]["training"]) for row in content["rows"]] == [
        ("timm", False), ("deit_fast", False), ("timm", True), ("deit_fast", True),
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 1 for row in content["rows"])
    assert content["rows"][2]["case"]["drop_path"] == 0.1
    assert {"device", "torch", "Triton", "commit", "command"} <= content["environment"].keys()
    printed = capsys.readouterr().out
    assert "inference, float32, batch 2" in printed and "deit_fast" in printed


def test_each_rate_of_drop_path_is_a_case(tmp_path):
    arguments = ["bench", *SMALL, "--suite", "train", "--drop-path", "0,0.5", "--peers", "deit_fast"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    cases = [row.case for row in Results.read(tmp_path / "results.json").rows]
    assert [(case.training, case.drop_path) for case in cases] == [(False, 0.0), (True, 0.0), (True, 0.5)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "keras"], "--peers: unknown keras; known: timm; "),
        (["--models", "resnet_of_mine"], "--models: unknown resnet_of_mine"),
        (["--batch", "8,0"], "--batch must be sizes of at least 1"),
        (["--dtype", "int8"], "--dtype: unknown int8; known: float32"),
        (["--amp", "float32"], "--amp: unknown float32"),
        (["--drop-path", "1"], "--drop-path must be rates in [0, 1)"),
        (["--drop-path", "0,high"], "got 0,high"),
        (["--suite", "host"], "unset it"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--profile"], "--profile shows a GPU's kernels"),
        (
            ["--peers", "flash-attn ViT"],
            "none can be measured here: flash-attn ViT: flash_attn is not installed",
        ),
    ],
)
def test_bad_input_is_one_error_before_any_work(arguments, said, tmp_path, capsys):
    assert main(["bench", *SMALL, *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("deit-fast: error: ")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_an_error_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["bench", *SMALL, "--out", str(tmp_path / "file" / "out")]) == 2
    assert "is no folder that can be written to" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["bench", *SMALL, "--device", "cuda:99", "--out", str(tmp_path)]) == 2
    assert "--device cuda:99 cannot be used" in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_measured(tmp_path, monkeypatch, capsys):
    """Ctrl-C in the third round of the second case."""
    timings = itertools.count(1)

    def seconds(self, call, calls: int) -> float:
        if next(timings) == 2 * 3 + 2 * 2 + 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(CpuClock, "seconds", seconds)
    arguments = ["bench", "--suite", "train", *SMALL, "--rounds", "3", "--peers", "timm;deit_fast"]
    assert main([*arguments, "--out", str(tmp_path)]) == 130
    assert "Interrupted" in capsys.readouterr().out
    rows = Results.read(tmp_path / "results.json").rows
    assert [(row.contender, row.case.training, row.seconds) for row in rows] == [
        ("timm", False, [1.0] * 3), ("deit_fast", False, [1.0] * 3),
        ("timm", True, [1.0] * 2), ("deit_fast", True, [1.0] * 2),
    ]  # fmt: skip
    assert "training" in (tmp_path / "results.md").read_text()


def test_where_memory_runs_out_the_other_cases_are_measured(tmp_path, capsys):
    arguments = ["bench", *SMALL[2:], "--suite", "ops", "--batch", "2000000000,2", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = Results.read(tmp_path / "results.json")
    assert {row.case.batch for row in found.operators if row.seconds} == {2}
    full = "deit_tiny_distilled_patch16_224, 32 px, inference, float32, batch 2000000000: operators"
    assert found.unmeasured[full] == "out of memory at batch 2000000000"
    assert f"Not measured: {full}: out of memory" in capsys.readouterr().out
    assert f"- {full}: out of memory" in (tmp_path / "results.md").read_text()


def test_what_a_profile_dies_of_is_noted(tmp_path, monkeypatch):
    def full(step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(profile, "profiled", full)
    results = Results({}, [])
    case = ModelCase("deit_tiny_distilled_patch16_224", 2, 32)
    console = Console()
    session = bench._Session(console, bench._progress(console), torch.device("cpu"), 1, results, tmp_path)
    session.run([], [], [], [case], host=False)
    assert results.unmeasured == {f"{case.title}: profile": "out of memory at batch 2"}
    assert results.kernels == {}


def test_the_bar_goes_on_with_the_rounds_and_ends_full(tmp_path, monkeypatch):
    console = Console()
    progress = bench._progress(console)
    seen = []

    def seconds(self, call, calls: int) -> float:
        seen.append(progress.tasks[0].completed)
        return 1.0

    monkeypatch.setattr(CpuClock, "seconds", seconds)
    case = ModelCase("deit_tiny_distilled_patch16_224", 2, 32)
    session = bench._Session(console, progress, torch.device("cpu"), 2, Results({}, []), tmp_path)
    session.run([case, case], [CONTENDERS["timm"]], [], [], host=False)
    # Checking, warming up, and two rounds make a case.
    assert seen == pytest.approx([3 / 4, 1, 1 + 3 / 4, 2])
    assert progress.tasks[0].completed == progress.tasks[0].total == 2


def test_a_peer_that_cannot_be_measured_here_is_named_once(tmp_path, capsys):
    arguments = ["bench", *SMALL, "--suite", "train", "--peers", "timm;flash-attn ViT", "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("flash-attn ViT: flash_attn is not installed") == 1
    found = Results.read(tmp_path / "results.json")
    assert found.unmeasured == {"flash-attn ViT": "flash_attn is not installed"}
    assert {row.contender for row in found.rows} == {"timm"}


def test_a_run_that_measured_nothing_fails(tmp_path, monkeypatch, capsys):
    def check(*_) -> float:
        raise RuntimeError("no")

    monkeypatch.setattr(measure, "check", check)
    assert main(["bench", *SMALL, "--peers", "timm", "--out", str(tmp_path)]) == 1
    assert "Nothing could be measured." in capsys.readouterr().out


def test_a_model_that_is_not_supported_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # a ResNet takes no depth
    arguments = ["bench", *SMALL, "--models", "deit_tiny_patch16_224,resnet18", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "--models: resnet18 is a ResNet; supported: timm's VisionTransformer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_results_of_another_command_are_not_overwritten(tmp_path, monkeypatch, capsys):
    arguments = ["bench", *SMALL, "--peers", "timm", "--out", str(tmp_path)]
    Results({"command": "deit-fast bench"}, []).write(tmp_path / "results.json")
    monkeypatch.setattr("sys.argv", ["deit-fast", *arguments])
    assert main(arguments) == 2
    assert "holds the results of another command" in capsys.readouterr().err
    assert Results.read(tmp_path / "results.json") == Results({"command": "deit-fast bench"}, [])
    (tmp_path / "results.json").unlink()
    # Its own it measures anew.
    assert main(arguments) == main(arguments) == 0


def test_compare_says_what_changed(tmp_path, capsys):
    arguments = ["bench", *SMALL, "--peers", "timm", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    capsys.readouterr()
    a = str(tmp_path / "a" / "results.json")
    found = Results.read(Path(a))
    assert found.environment["timm"] and "transformers" not in found.environment
    # The load of the machine is no other device.
    found.environment["device"] = found.environment["device"].partition("; load")[0] + "; load average 99.0"
    found.write(tmp_path / "later.json")
    assert main(["bench", "compare", a, str(tmp_path / "later.json")]) == 0
    assert capsys.readouterr().out.startswith("within noise")
    found.environment["device"] = "a GPU"
    found.write(tmp_path / "other.json")
    assert main(["bench", "compare", a, str(tmp_path / "other.json")]) == 0
    assert capsys.readouterr().out.startswith("Measured on different devices: ")
    assert main(["bench", "compare", a, a]) == 0
    assert capsys.readouterr().out.startswith("within noise  1.00x  timm: deit_tiny")
    empty = tmp_path / "empty.json"
    Results({}, []).write(empty)
    assert main(["bench", "compare", a, str(empty)]) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_a_wrong_contender_fails_the_run(tmp_path, monkeypatch, capsys):
    def check(*_) -> float:
        raise ArithmeticError("wrong: error 1")

    monkeypatch.setattr(measure, "check", check)
    assert main(["bench", *SMALL, "--peers", "timm", "--out", str(tmp_path)]) == 1
    assert "ArithmeticError: wrong" in (tmp_path / "results.md").read_text()


def test_operators_are_timed_beside_their_stock_form(tmp_path, capsys):
    arguments = ["bench", *SMALL[2:], "--suite", "ops", "--measure-peaks", "--out", str(tmp_path)]
    assert main(arguments) == 0
    found = Results.read(tmp_path / "results.json")
    assert found.rows == [] and found.peaks.flops["float32"] > 0
    assert {row.case.training for row in found.operators} == {False, True}
    rows = {(row.operator, row.contender): row for row in found.operators if not row.case.training}
    assert {operator for operator, _ in rows} == {
        "patch_embed",
        "readout_attention",
        "linear_residual",
        "layer_norm_linear",
        "layer_norm",
    }
    assert all(row.failure is None and len(row.seconds) == 1 for row in rows.values())
    # Two images of two rows, to width 768.
    assert rows["layer_norm_linear", "deit_fast"].flops == 2 * 2 * 2 * 192 * 768
    page = (tmp_path / "results.md").read_text()
    assert "# Operators" in page and "of the roofline" in page and "![operators-1](operators-1.png)" in page
    assert "Operators: deit_tiny" in capsys.readouterr().out
