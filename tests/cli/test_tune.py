import warnings

import pytest
import torch

from deit_fast.benchmark import operator_cases, tasks, tune
from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.tune import Tuned
from deit_fast.cli.main import main
from deit_fast.cli.tune import tune_case
from deit_fast.kernels.launching import hardware, tuned
from deit_fast.kernels.launching.tuned import Choice
from deit_fast.ops.operator import OPERATORS


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """A worker would not find what stands in for the measuring."""
    monkeypatch.setattr(tasks, "run_tasks", tasks.run_tasks_here)
    monkeypatch.setattr(tasks, "clock_of", lambda device: None)
    tasks._operators.cache_clear()
    yield
    tasks._operators.cache_clear()


def test_without_a_gpu_it_is_one_error(capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "tune measures a GPU, and there is none here" in capsys.readouterr().err


def test_every_operator_is_written_as_soon_as_it_is_measured(tmp_path, monkeypatch, capsys):
    """On a stand-in for the measuring; Ctrl-C comes after the first operator."""
    from rich.console import Console

    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path))
    monkeypatch.setattr(hardware, "device_name", lambda device: "GPU")
    case, next_case = (
        operator_cases.OperatorCase(OPERATORS[name], "x=198x192bf16", 8, ()) for name in ("mlp", "layer_norm")
    )

    def measured(cases, clock, rounds, say):
        say("tuning")
        if cases == [next_case]:
            raise KeyboardInterrupt
        yield Tuned(
            case, Choice(False, {"mlp(192, sm_90)": {"rows": 32}}), {"stock": 3e-6, "shipped": 2e-6, "tuned": 1e-6}, 9
        )

    monkeypatch.setattr(operator_cases, "operator_cases", lambda *_: [case, next_case])
    monkeypatch.setattr(tune, "tune", measured)
    with pytest.raises(KeyboardInterrupt):
        tune_case(ModelCase("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), Console(), anew=True)
    assert [file.name for file in tmp_path.iterdir()] == [tuned.file_name("mlp", "x=198x192bf16", "GPU")]
    tuned.forget()


def test_what_has_no_kernel_is_named_and_not_written(tmp_path, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path))
    monkeypatch.setattr(hardware, "device_name", lambda device: "GPU")
    case = operator_cases.OperatorCase(OPERATORS["mlp"], "x=198x192fp64", 8, ())
    monkeypatch.setattr(operator_cases, "operator_cases", lambda *_: [case])
    monkeypatch.setattr(tune, "tune", lambda *_: iter([Tuned(case, Choice(True, {}), {}, 0, "no kernel for float64")]))
    tune_case(ModelCase("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), Console(width=200), anew=True)
    assert "no kernel for float64" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_was_tuned_before_is_tuned_again_only_where_it_is_asked_for(tmp_path, monkeypatch, capsys):
    """Of two shapes, one measured at this batch, and the other at another batch, by another driver, or not at all."""
    from rich.console import Console

    monkeypatch.setenv("DEIT_FAST_TUNED", str(tmp_path))
    monkeypatch.setattr(hardware, "device_name", lambda device: "GPU")
    here, mlp = hardware.driver_version(), OPERATORS["mlp"]
    known, other = (operator_cases.OperatorCase(mlp, f"x={tokens}x192bf16", 8, ()) for tokens in (198, 578))
    monkeypatch.setattr(operator_cases, "operator_cases", lambda case, device: [known, other])
    tuned_now = []
    monkeypatch.setattr(
        tune,
        "tune",
        lambda cases, *_: iter([tuned_now.extend(cases) or Tuned(cases[0], Choice(True, {}), {}, 0, "not measured")]),
    )

    def tuned_with(anew: bool) -> list:
        tuned_now.clear()
        tune_case(ModelCase("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), Console(width=200), anew)
        return list(tuned_now)

    tuned.forget()
    assert tuned_with(anew=False) == [known, other]
    tuned.write("mlp", known.shape, "GPU", here, 8, Choice(True, {}))
    for batch, driver in ((4, here), (8, "another")):
        tuned.write("mlp", other.shape, "GPU", driver, batch, Choice(True, {}))
        tuned._said.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert tuned_with(anew=False) == [other]
    assert "1 of 2 operators are as they were tuned before" in capsys.readouterr().out
    assert tuned_with(anew=True) == [known, other]
    tuned.write("mlp", other.shape, "GPU", here, 8, Choice(True, {}))
    assert tuned_with(anew=False) == []
    tuned.forget()


def test_a_step_that_memory_does_not_suffice_for_is_named(monkeypatch, capsys):
    from rich.console import Console

    def full(case, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(operator_cases, "operator_cases", full)
    tune_case(ModelCase("deit_tiny_patch16_224", 8, 224), torch.device("cuda"), Console(width=200), anew=True)
    assert "Not tuned: out of memory at batch 8" in capsys.readouterr().out
