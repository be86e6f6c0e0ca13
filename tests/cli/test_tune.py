import pytest
import torch

from deit_fast.benchmark import operator_cases, tune
from deit_fast.benchmark.contenders import Case
from deit_fast.benchmark.tune import Tuned
from deit_fast.cli.main import main
from deit_fast.cli.tune import tune_case
from deit_fast.kernels import launch, tuned
from deit_fast.kernels.tuned import Choice
from deit_fast.ops.registration import OPERATORS


def test_without_a_gpu_it_is_one_error(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "tune measures a GPU, and there is none here" in capsys.readouterr().err


def test_every_operator_is_written_as_soon_as_it_is_measured(tmp_path, monkeypatch, capsys):
    """On a stand-in for the measuring; Ctrl-C comes after the first operator."""
    from rich.console import Console

    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path))
    monkeypatch.setattr(launch, "device_name", lambda device: "GPU")
    case = operator_cases.OperatorCase(OPERATORS["mlp"], "x=198x192bf16", 8, ())

    def measured(cases, clock, rounds, say):
        say("first")
        yield Tuned(
            case, Choice(False, {"mlp(192, sm_90)": {"rows": 32}}), {"stock": 3e-6, "shipped": 2e-6, "tuned": 1e-6}, 9
        )
        raise KeyboardInterrupt

    monkeypatch.setattr(operator_cases, "operator_cases", lambda case, device: [case])
    monkeypatch.setattr(tune, "tune", measured)
    with pytest.raises(KeyboardInterrupt):
        tune_case(Case("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), None, Console())
    assert [file.name for file in tmp_path.iterdir()] == ["mlp,x=198x192bf16,device_name=GPU.json"]
    tuned.forget()


def test_what_has_no_kernel_is_named_and_not_written(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path))
    case = operator_cases.OperatorCase(OPERATORS["mlp"], "x=198x192fp64", 8, ())
    monkeypatch.setattr(operator_cases, "operator_cases", lambda case, device: [case])
    monkeypatch.setattr(tune, "tune", lambda *_: iter([Tuned(case, Choice(True, {}), {}, 0, "no kernel for float64")]))
    tune_case(Case("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), None, Console(width=200))
    assert "no kernel for float64" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
