import json
from pathlib import Path

import pytest

from deit_fast.benchmark.gpu.record import Record, RecordEntry
from evidence.gpu_page import PAGE, RESULTS, TITLE, page
from tests.support.compiled import printed_by


def test_the_committed_page_is_what_the_results_say():
    assert PAGE.read_text() == page(RESULTS)


def test_nothing_is_claimed_before_a_gpu_has_measured_it(tmp_path):
    text = page(tmp_path)
    assert "Not yet measured" in text and "deit-fast gpu --out" in text and "times faster" not in text


def test_what_a_gpu_measured_is_shown(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    entries = [
        RecordEntry("models", f"DeiT-small, batch 64, inference, {contender}", 1.0, {"seconds": seconds})
        for contender, seconds in (("stock", 2e-3), ("deit_fast", 1e-3))
    ]
    Record({"device": "a GPU"}, entries).write(tmp_path / "mine")
    text = page(tmp_path)
    assert "## a GPU" in text and "| DeiT-small, batch 64, inference | 2.00 | 1.00 |  |  | 2.00 |  |" in text
    assert "Not yet measured" not in text and "### Launches" not in text


# What stands beside the times -----------------------------------------------------------------------------------------

COUNTED = {"target": "sm_90", "name": "linear 8x8x8 bf16", "programs": 10, "floor": 3.0, "floor_bound": "memory",
           "modelled": 5.0, "modelled_bound": "latency"}  # fmt: skip


def page_of(folder: Path, counted: list[dict], own: list[dict] | None = None, gpu: str = "NVIDIA H200, sm_90") -> str:
    """Of one operator that was timed twice."""
    (folder / "mine").mkdir()
    result = {"operator": "linear", "flops": 1, "bytes": 1, "times": 1, "seconds": {"deit_fast": 1e-5}}
    work = {"flops": 1, "bytes": 1, "registers": 1, "spills": 0}
    launches = [{"name": COUNTED["name"], "programs": 10, "seconds": seconds, **work} for seconds in (8e-6, 6e-6)]
    uncounted = {"name": "k", "programs": 1, "seconds": 1.0, **work}
    entry = RecordEntry("launches", "linear", 1.0, result | {"launches": [*launches, uncounted]})
    failed = RecordEntry("launches", "attention", 1.0, None, "took longer than 60 s")
    Record({"device": gpu}, [entry, failed]).write(folder / "mine")
    (folder / "clocks.json").write_text(json.dumps(counted))
    if own is not None:
        (folder / "mine" / "clocks.json").write_text(json.dumps(own))
    return page(folder, folder / "clocks.json")


def test_each_timed_launch_stands_beside_its_prediction(tmp_path):
    text = page_of(tmp_path, [COUNTED])
    assert "| linear 8x8x8 bf16 | 10 | 3.0 | 5.0 | 6.0 | 1.20 | latency |" in text
    assert "Counted and modelled for the H200" in text and "The median launch takes 1.20 of" in text


def test_without_a_modelled_time_the_floor_is_the_prediction(tmp_path):
    text = page_of(tmp_path, [COUNTED | {"modelled": None, "modelled_bound": None}])
    assert "| linear 8x8x8 bf16 | 10 | 3.0 | – | 6.0 | 2.00 | memory |" in text


def test_what_the_folder_has_counted_itself_comes_first(tmp_path):
    assert "| 3.0 | 12.0 | 6.0 | 0.50 |" in page_of(tmp_path, [COUNTED], [COUNTED | {"modelled": 12.0}])


@pytest.mark.parametrize("other", [{"target": "sm_80"}, {"programs": 11}, {"name": "linear 9x8x8 bf16"}])
def test_what_was_counted_of_another_launch_or_gpu_stands_beside_none(tmp_path, other):
    assert TITLE not in page_of(tmp_path, [COUNTED | other])


def test_a_gpu_that_nothing_was_counted_for_has_no_predictions(tmp_path):
    assert TITLE not in page_of(tmp_path, [COUNTED], gpu="NVIDIA GeForce GTX 1080, sm_61")


def test_the_launches_that_are_timed_are_those_that_are_counted():
    found = printed_by("-m", "tests.evidence.block_launches")
    assert found["timed"] == found["counted"]
