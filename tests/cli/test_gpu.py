"""`deit-fast gpu`: every step on a stand-in for a GPU, and what happens where a task ends badly or the time is over."""

import json
import os
import signal
import time
from functools import partial
from itertools import chain, repeat

import pytest
import torch

from deit_fast.benchmark.gpu import run as runner
from deit_fast.benchmark.gpu.record import Record
from deit_fast.benchmark.gpu.steps import STEPS, Step, Task
from deit_fast.benchmark.gpu.summary import failures, summary
from deit_fast.cli import gpu
from deit_fast.cli.main import main
from deit_fast.ops import backend
from tests.support.compiled import printed_by

CPU = torch.device("cpu")
HERE = {"device": "Stand-in", "torch": "2.14"}


@pytest.fixture(scope="module")
def whole() -> dict:
    return printed_by("-m", "tests.cli.first_minutes_checks")


def test_every_step_is_done_and_no_task_fails(whole):
    entries = whole["results"]["entries"]
    assert list(dict.fromkeys(entry["step"] for entry in entries)) == [step.name for step in STEPS]
    assert [entry["name"] for entry in entries if entry["failure"]] == []
    assert whole["results"]["not_reached"] == {}


def test_launches_are_repeated_from_plans(whole):
    (plans,) = (entry["result"] for entry in whole["results"]["entries"] if entry["name"] == "plans")
    assert plans == {"launches through Triton": [1, 0, 0], "runner is known": True}


def test_the_compile_step_leaves_nothing_to_compile_later(whole):
    """Its kernels are found in Triton's cache: no later task takes the seconds that compiling takes."""
    (compiled,) = (entry["result"] for entry in whole["results"]["entries"] if entry["step"] == "compile")
    assert compiled["failed"] == {} and compiled["kernels"] > 30
    assert whole["compiled later"] == []


def test_each_launch_of_a_block_has_its_time_its_work_and_its_peers(whole):
    timed = [entry["result"] for entry in whole["results"]["entries"] if entry["step"] == "launches"]
    assert {each["operator"] for each in timed} >= {"attention", "linear_backward", "layer_norm_linear", "fc2_residual"}
    for each in timed:
        assert {"deit_fast", "stock"} <= each["seconds"].keys()
        # No CPU has flash attention's backward.
        assert each["not timed"].keys() <= ({"flash SDPA"} if each["operator"] == "attention_backward" else set())
        assert each["bytes"] > 0 and each["launches"]
        assert all(launch["bytes"] > 0 and launch["seconds"] > 0 for launch in each["launches"])
    of = {each["operator"]: each["seconds"].keys() for each in timed}
    assert "flash SDPA" in of["attention"] and "vendor's GEMM alone" in of["linear_backward"]


def test_it_ends_with_a_page_and_settings_that_can_be_committed(whole):
    page = whole["summary"]
    for heading in (
        "What failed",
        "By the vendor's GEMM",
        "Operators",
        "Launches",
        "Blocks and models",
        "Tuned settings",
        "Not reached",
    ):
        assert f"## {heading}" in page
    # Nothing runs on the stand-in, so whatever is compared is wrong, and the page says so.
    assert whole["first"]["code"] == 1 and "results of linear_residual" in page
    assert "| DeiT-tiny, batch 2, training | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 | 1.00 |" in page
    assert len(whole["tuned"]) >= 8


def test_a_second_call_has_nothing_left_to_do(whole):
    assert "done (" in whole["first"]["printed"] and "done (" not in whole["second"]["printed"]


def test_without_a_gpu_one_line_says_what_it_needs(capsys):
    assert main(["gpu", "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "gpu needs an NVIDIA or AMD GPU that PyTorch can use" in err


# Tasks that end badly, in real processes -----------------------------------------------------------------------------


def act(device: torch.device, what: str) -> str:
    if what == "hang":
        print("about to hang", flush=True)
        time.sleep(600)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "lose the device":
        torch.cuda.is_initialized = lambda: True
        backend.device_error = lambda error, device: error
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return what


def a_step(name: str, *whats: str, seconds: float = 60.0) -> Step:
    return Step(name, seconds, lambda *_: [Task(name, what, CPU, act, (what,)) for what in whats])


def test_a_task_that_hangs_crashes_or_loses_the_device_is_one_entry_and_the_rest_is_done(tmp_path):
    said: list[str] = []
    record = Record(HERE)
    first = a_step("first", "one", "crash", "lose the device", "two")
    runner.run(record, None, CPU, 600, tmp_path, said.append, [first, a_step("second", "hang", "x", seconds=20), first])
    ends = {entry.name: entry.failure or entry.result for entry in record.entries}
    assert ends == {
        "one": "one",
        "crash": "its process ended: killed by SIGSEGV",
        "lose the device": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "two": "two",
        "hang": "took longer than 20 s",
        "x": "x",
    }
    assert "about to hang" in next(entry.printed for entry in record.entries if entry.name == "hang")
    assert Record.read(tmp_path / "results.json") == record and len(said) == 6
    page = summary(record)
    assert failures(record) and all(failure in page for failure in failures(record))


def test_where_the_time_ends_in_the_middle_a_second_call_goes_on(tmp_path):
    of = [a_step("first", "one", "two"), a_step("second", "three")]
    # Asked at the start, before a process starts, and twice a task.
    ticks = chain([0.0, 1.0, 1.0, 1.0], repeat(100.0))
    record = Record(HERE)
    runner.run(record, None, CPU, 50, tmp_path, print, of, lambda: next(ticks))
    assert [entry.name for entry in record.entries] == ["one"]
    assert record.not_reached == {"first": ["two"], "second": ["three"]}
    assert "- first: 1, from two on" in summary(record)
    record = gpu._begun(tmp_path, HERE)
    runner.run(record, None, CPU, 600, tmp_path, print, of)
    assert [entry.name for entry in record.entries] == ["one", "two", "three"] and record.not_reached == {}


def test_results_of_another_machine_or_another_kind_are_not_added_to(tmp_path):
    Record(HERE).write(tmp_path)
    with pytest.raises(ValueError, match=r"another machine or release \(torch 2.14, here 2.15\): give another folder"):
        gpu._begun(tmp_path, {**HERE, "torch": "2.15"})
    for content, said in (("{}", "no results"), ("[", "no results"), (json.dumps({"version": 2}), "reads 1")):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            gpu._begun(tmp_path, HERE)


def tuned_folder(device: torch.device) -> str:
    return os.environ["DEIT_FAST_TUNED"]


def test_the_settings_of_the_run_are_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("DEIT_FAST_TUNED", "elsewhere")
    tuned = Step("tuned", 60, lambda *_: [Task("tuned", "folder", CPU, tuned_folder)])
    record = Record(HERE)
    runner.run(record, None, CPU, 600, tmp_path, partial(print), [tuned])
    assert record.entries[0].result == str(tmp_path / "tuned")
