from pathlib import Path

from deit_fast.benchmark.gpu.record import Record, RecordEntry
from evidence.gpu_page import PAGE, RESULTS, page


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
