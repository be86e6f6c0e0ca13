"""`deit-fast plan`, through `main` as the console script calls it."""

from dataclasses import replace

import pytest

from deit_fast.benchmark.contenders import ModelCase
from deit_fast.benchmark.measure import Row
from deit_fast.benchmark.results import Results
from deit_fast.cli.main import main

MODEL = "deit_small_distilled_patch16_224"


@pytest.fixture
def bench(tmp_path):
    case = ModelCase(MODEL, 64, 224, amp="bfloat16", training=True, drop_path=0.1)
    rows = [Row(case, "deit_fast", [0.5] * 7), Row(replace(case, training=False), "deit_fast", [0.1] * 7)]
    Results({"device": "Some GPU; load average 1"}, rows).write(tmp_path / "results.json")
    return tmp_path / "results.json"


def planned(capsys, arguments: str, code: int = 0) -> str:
    assert main(f"plan --model {MODEL} {arguments}".split()) == code
    return capsys.readouterr().out


def test_each_line_says_whether_it_is_computed_or_given(capsys):
    printed = planned(capsys, "--precision bf16 --gpu-memory 8 --gpus 4 --images-per-second 10000 --ema")
    assert "Given: deit_small_distilled_patch16_224: 224 x 224 pixels, bf16, memory balanced, 4 x 256 images" in printed
    assert "Memory a GPU, GiB, computed:" in printed and "256 images of 16.47 MiB" in printed
    assert "DistributedDataParallel's buckets" in printed and "moving average" in printed
    assert "Not counted: workspace" in printed
    assert "Largest batch in 8 GiB, computed, at most: 481 images a GPU\n" in printed
    assert "Steps, computed: 375,300 (300 epochs of 1,251)" in printed
    assert "Throughput: 10,000.0 images/s (given)" in printed
    assert "Days, computed from it: 0.44" in printed


def test_without_a_throughput_no_days_are_told(capsys):
    printed = planned(capsys, "")
    assert "Days: not known without a throughput" in printed and "images/s" not in printed


def test_a_batch_that_does_not_fit_is_said(capsys):
    assert "256 does not fit" in planned(capsys, "--gpu-memory 1", code=1)
    assert "at most: 0 images a GPU; 256 does not fit" in planned(capsys, "--gpu-memory 0.1", code=1)


def test_a_bench_result_gives_the_throughput_of_one_gpu(bench, capsys):
    printed = planned(capsys, f"--gpus 8 --bench {bench}")
    assert "Throughput: 1,024.0 images/s (8 x 128.0, measured at batch 64 without an optimizer" in printed
    assert "on Some GPU)" in printed and "Days, computed from it: 4.34" in printed


def test_a_second_token_can_be_asked_for(bench, capsys):
    assert main(f"plan --model deit_small_patch16_224 --distilled --bench {bench}".split()) == 0
    assert "deit_small_patch16_224, distilled: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu 2", "unrecognized arguments: --gpu 2"),  # no abbreviation
        ("--precision fp8", "invalid choice: 'fp8'"),
        ("--gpus 0", "--gpus must be positive, got 0"),
        ("--gpu-memory nan", "--gpu-memory must be positive"),
        ("--drop-path 1", "--drop-path must be in [0, 1)"),
        ("--image-size 225", "img_size must be a multiple of the patch size 16"),
        ("--model deit_smal_patch16_224", "unknown model 'deit_smal_patch16_224'. Did you mean"),
        ("--distilled", "is distilled already"),
        ("--images 1000 --gpus 8", "a step of 8 x 256 images is more than an epoch's 1000"),
        ("--images-per-second 1 --bench BENCH", "not allowed with argument"),
        ("--memory low --bench BENCH", "--bench measures --memory balanced"),
        ("--precision bf16 --bench BENCH", "has no timed step of deit_fast for this model"),
        ("--bench none.json", "No such file"),
    ],
)
def test_what_is_wrong_is_one_message(bench, capsys, arguments, message):
    try:
        code = main(f"plan --model {MODEL} {arguments}".replace("BENCH", str(bench)).split())
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and message in printed.err and printed.out == ""


def test_the_help_is_read_on_one_screen(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 50 and max(map(len, printed.splitlines())) <= 110
    assert all(f"{group}:" in printed for group in ("model", "GPUs", "training step", "run"))
