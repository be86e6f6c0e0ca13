from pathlib import Path

from bench.gpu_page import RESULTS, page
from deit_fast.benchmark.contenders import Case
from deit_fast.benchmark.measure import Row
from deit_fast.benchmark.results import Results


def test_the_committed_page_is_what_the_results_say():
    assert (RESULTS / "gpu.md").read_text() == page(RESULTS / "gpu")


def test_nothing_is_claimed_before_a_gpu_has_measured_it(tmp_path):
    text = page(tmp_path)
    assert "Not yet measured" in text and "deit-fast bench --dtype bfloat16" in text and "images/s" not in text


def test_what_a_gpu_measured_is_shown(tmp_path: Path):
    case = Case("deit_small_patch16_224", 64, 224, "bfloat16")
    environment = {"device": "a GPU", "command": "deit-fast bench", "commit": "abc"}
    (tmp_path / "mine").mkdir()
    rows = [Row(case, "timm", [2.0] * 3), Row(case, "deit_fast", [1.0] * 3)]
    Results(environment, rows).write(tmp_path / "mine" / "results.json")
    text = page(tmp_path)
    assert "## a GPU" in text and "| deit_fast | 64.0 | 2.00 (2.00–2.00) timm |  |" in text
    assert "Not yet measured" not in text
