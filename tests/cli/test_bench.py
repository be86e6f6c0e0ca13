import json

import pytest

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
    measured = bench._measure

    def interrupted(case, *rest) -> None:
        if case.training:
            raise KeyboardInterrupt
        measured(case, *rest)

    monkeypatch.setattr(bench, "_measure", interrupted)
    arguments = ["bench", "--suite", "train", *SMALL, "--peers", "timm"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert "Interrupted" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1


def test_compare_says_what_changed(tmp_path, capsys):
    arguments = ["bench", *SMALL, "--peers", "timm", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    capsys.readouterr()
    a = str(tmp_path / "a" / "results.json")
    assert main(["bench", "compare", a, a]) == 0
    assert capsys.readouterr().out.startswith("within noise  1.00x  timm: deit_tiny")
    empty = tmp_path / "empty.json"
    Results({}, []).write(empty)
    assert main(["bench", "compare", a, str(empty)]) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_a_wrong_contender_fails_the_run(tmp_path, monkeypatch, capsys):
    from deit_fast.benchmark import measure

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
        "mlp",
        "layer_norm",
    }
    assert all(row.failure is None and len(row.seconds) == 1 for row in rows.values())
    # Two images of two rows, to width 768 and back.
    assert rows["mlp", "deit_fast"].flops == 2 * 2 * 2 * 2 * 192 * 768
    page = (tmp_path / "results.md").read_text()
    assert "# Operators" in page and "of the roofline" in page and "![operators-1](operators-1.png)" in page
    assert "Operators: deit_tiny" in capsys.readouterr().out
