"""Writes bench/results/gpu.md, the page of what was measured on GPUs.

    python -m bench.gpu_page

A GPU's results are a folder in bench/results/gpu/, which `COMMAND` fills on a machine that has it.
"""

from pathlib import Path

from deit_fast.benchmark.results import HEADER, Results, by_case, cells
from deit_fast.benchmark.tables import figures, table

RESULTS = Path(__file__).with_name("results")
COLUMNS = ("contender", "images/s", "times faster than", "TFLOP/s (of peak)")
COMMAND = "deit-fast bench --dtype bfloat16 --batch 1,8,64,256 --profile --out bench/results/gpu/NAME"


def page(folder: Path) -> str:
    """What the folders in `folder` hold; that nothing is measured where there is none."""
    parts = ["# GPUs"]
    files = sorted(folder.glob("*/results.json"))
    if not files:
        parts += ["Not yet measured: no GPU has run these benchmarks.", f"This fills the page:\n\n    {COMMAND}"]
        parts.append("and after it, `python -m bench.gpu_page`. It is the machine's own GPU that speaks.")
    for file in files:
        results = Results.read(file)
        name = file.parent.name
        parts.append(f"## {results.environment['device']}\n\n[All of it](gpu/{name}/results.md)")
        parts.append(f"`{results.environment['command']}`, commit {results.environment['commit']}")
        for case, group in by_case(results.rows).items():
            shown = [HEADER.index(name) for name in COLUMNS]
            rows = ([found[i] for i in shown] for found in (cells(line, results.peaks) for line in group))
            parts.append(f"### {case.title}\n\n{table((COLUMNS[0], *figures(COLUMNS[1:])), rows)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (RESULTS / "gpu.md").write_text(page(RESULTS / "gpu"))


if __name__ == "__main__":
    main()
