import csv
import json
from dataclasses import replace

import pytest

from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.host import HostTime
from deit_fast.benchmark.measure import Row
from deit_fast.benchmark.operators import OperatorRow
from deit_fast.benchmark.peaks import Peaks
from deit_fast.benchmark.plots import write_plots
from deit_fast.benchmark.profile import KernelTime
from deit_fast.benchmark.results import Results, compare, lines, markdown, write_csv

INFERENCE = ModelCase("deit_tiny_patch16_224", 8, 224)
TRAINING = ModelCase("deit_tiny_patch16_224", 8, 224, training=True, drop_path=0.1)


def results(factor: float = 1.0) -> Results:
    seconds = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    rows = [
        Row(INFERENCE, "timm", seconds, error=1e-6, flops=2_000_000_000, stock_flops=2_000_000_000, operator_calls=100),
        Row(INFERENCE, "deit_fast", [s / 2 * factor for s in seconds], flops=1_840_000_000, stock_flops=2_000_000_000),
        Row(INFERENCE, "timm, compiled", failure="out of memory at batch 8"),
        Row(TRAINING, "timm", [1.0] * 7, saved_bytes=2**21, peak_bytes=2**30),
    ]
    operators = [
        OperatorRow(INFERENCE, "mlp", "x=198x192bf16", 12, "stock", [2e-3] * 7, flops=10**9, moved=10**6),
        OperatorRow(INFERENCE, "mlp", "x=198x192bf16", 12, "deit_fast", [1e-3] * 7, 1e-4, flops=10**9, moved=10**6),
        OperatorRow(INFERENCE, "mlp", "x=198x192bf16", 12, "Apex", failure="apex is not installed"),
    ]
    kernels = {INFERENCE.title: [KernelTime("mlp_kernel 8×198×192", 12, 6e-4, 3e9, 6e6), KernelTime("copy", 1, 2e-4)]}
    peaks = Peaks({"float32": 4e12}, 1e12, "a data sheet")
    host = [HostTime("block", "inference", 80.0, 60.0)]
    unmeasured = {"flash-attn ViT": "flash_attn is not installed"}
    return Results({"device": "a GPU", "torch": "2"}, rows, host, operators, kernels, peaks, unmeasured)


def test_what_is_written_is_read(tmp_path):
    results().write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == results()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", '{"rows": []}', '{"version": 9, "environment": {}, "rows": [], "host": []}']
)
def test_another_file_is_an_error_that_names_it_or_its_version(content, tmp_path):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"other.json is no result|its version is 9"):
        Results.read(file)


def test_ratios_are_of_paired_rounds_against_the_model_replaced():
    timm, ours, absent, alone = lines(results().rows)
    assert ours.ratio == (2.0, 2.0, 2.0)
    assert ours.against == "timm"
    assert ours.images_per_second == pytest.approx(40)
    assert timm.ratio is None and absent.seconds is None and alone.ratio is None


def test_the_page_has_environment_tables_and_what_was_not_timed():
    text = markdown(results(), ["throughput-inference.png"])
    assert "- device: a GPU" in text
    assert "## deit_tiny_patch16_224, 224 px, inference, float32, batch 8" in text
    assert (
        "| deit_fast | 40.0 | 200.00 (50.00–350.00) | 2.00 (2.00–2.00) timm | "
        "2.00 (2.00–2.00) timm | 1.84 (2.00) |" in text
    )
    assert "| timm, compiled | out of memory at batch 8 |" in text
    assert "Not measured:\n\n- flash-attn ViT: flash_attn is not installed\n" in text
    # 1.84 GFLOPs an image at 40 images/s; 10⁹ FLOPs take 0.25 ms at the peak, and take 1.
    assert "| 0.07 (2 %) |" in text
    assert (
        "| 12 × mlp x=198x192bf16 | deit_fast | 1000.0 (1000.0–1000.0) | 2.00 (2.00–2.00) | 2.00 (2.00–2.00) stock | "
        "1.00 | 1.0 | 25 % |" in text
    )
    assert "| 12 × mlp x=198x192bf16 | Apex | apex is not installed |" in text
    assert "| mlp_kernel 8×198×192 | 12 | 600.0 | 75.0 % | 5.00 | 10.00 |" in text
    assert "| copy | 1 | 200.0 | 25.0 % |  |  |" in text
    assert "| block | inference | 80 | 60 | 0.75 |" in text
    assert "![throughput-inference](throughput-inference.png)" in text


def test_the_csv_has_timms_columns(tmp_path):
    write_csv(results(), tmp_path / "results.csv")
    with (tmp_path / "results.csv").open() as file:
        timm, ours, training = csv.DictReader(file)
    assert ours["infer_samples_per_sec"] == "40.0"
    assert ours["infer_step_time"] == "200.0"
    assert ours["infer_gmacs"] == "0.92"
    assert (training["train_batch_size"], training["infer_batch_size"]) == ("8", "")
    assert timm["model"] == "deit_tiny_patch16_224"


def test_the_best_peer_is_the_fastest_that_is_not_ours():
    rows = [
        Row(INFERENCE, "timm", [3.0] * 7),
        Row(INFERENCE, "transformers, sdpa", [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0]),
        Row(INFERENCE, "transformers, eager", failure="ValueError: no"),
        Row(INFERENCE, "deit_fast", [1.0] * 7),
        Row(INFERENCE, "deit_fast, tuned", [0.5] * 7),
        Row(TRAINING, "timm, explicit attention", [1.0] * 7),
    ]
    found = {line.row.contender: line for line in lines(rows)}
    ours = found["deit_fast"]
    assert (ours.ratio.median, ours.against) == (3.0, "timm")
    assert (ours.best, ours.peer) == ((2.0, 1.0, 2.0), "transformers, sdpa")
    assert found["transformers, sdpa"].best is None
    assert "| 3.00 (3.00–3.00) timm | 2.00 (1.00–2.00) transformers, sdpa |" in markdown(Results({}, rows))


def test_the_best_peer_of_an_operator_is_another_librarys():
    rows = results().operators[:2]
    rows.append(replace(rows[0], contender="Apex", seconds=[1.5e-3] * 7))
    # Faster, at another shape.
    rows.append(replace(rows[0], contender="Apex", shape="x=198x384bf16", seconds=[1e-6] * 7))
    assert "| 2.00 (2.00–2.00) | 1.50 (1.50–1.50) Apex |" in markdown(Results({}, [], operators=rows))


def test_where_stock_operators_answered_the_page_says_so():
    found = results()
    found.rows[1].fallbacks = ["deit_fast.mlp: no kernel"]
    found.operators[1].fallbacks = ["deit_fast.mlp: none here"]
    text = markdown(found)
    assert "\n- deit_fast: deit_fast.mlp: no kernel\n" in text and "\n- deit_fast: deit_fast.mlp: none here\n" in text


def verdicts(found: Results) -> dict[tuple[str, str], tuple[float, str]]:
    return {(what, contender): (ratio, verdict) for what, contender, ratio, verdict in compare(results(), found)}


@pytest.mark.parametrize(
    ("factor", "verdict", "ratio"),
    [(1.2, "within noise", 1 / 1.2), (0.1, "faster", 10.0), (10.0, "slower", 0.1)],
)
def test_a_change_is_one_whose_intervals_do_not_meet(factor, verdict, ratio):
    found = verdicts(results(factor))
    assert found[INFERENCE.title, "deit_fast"] == (pytest.approx(ratio), verdict)
    assert found[INFERENCE.title, "timm"] == (1.0, "within noise")


def test_operators_host_and_memory_are_compared_too():
    after = results()
    after.operators[1].seconds = [2e-3] * 7
    after.host = [HostTime("block", "inference", 80.0, 120.0)]
    after.rows[3].peak_bytes = 2**29
    found = verdicts(after)
    assert found[f"{INFERENCE.title}: mlp x=198x192bf16", "deit_fast"] == (0.5, "slower")
    assert found["host time: block, inference", "swapped"] == (0.5, "one median")
    assert found[f"{TRAINING.title}: peak bytes", "timm"] == (2.0, "less")
    assert found[f"{TRAINING.title}: saved bytes", "timm"] == (1.0, "the same")
    assert compare(results(), Results({}, [])) == []


def test_plots_are_written_for_what_was_timed(tmp_path):
    written = write_plots(results(), tmp_path)
    assert written == ["throughput-inference.png", "throughput-training.png", "operators-1.png", "memory.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in written)
    assert write_plots(Results({}, []), tmp_path) == []


def test_the_json_is_plain(tmp_path):
    results().write(tmp_path / "results.json")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][0]["case"]["model"] == "deit_tiny_patch16_224"
    assert content["rows"][0]["seconds"][0] == 0.1
