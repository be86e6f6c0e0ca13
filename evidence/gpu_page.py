"""Writes evidence/results/gpu.md, the page of what was measured on GPUs.

    python -m evidence.gpu_page

A GPU's results are a folder in bench/results/gpu/, which `COMMAND` fills on a machine that has it.
"""

from pathlib import Path

from deit_fast.benchmark.gpu.record import Record
from deit_fast.benchmark.gpu.summary import measured

PAGE = Path(__file__).with_name("results") / "gpu.md"
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "gpu"
COMMAND = "deit-fast gpu --out bench/results/gpu/NAME"


def page(folder: Path) -> str:
    """What the folders in `folder` hold; that nothing is measured where there is none."""
    parts = ["# GPUs"]
    files = sorted(folder.glob("*/results.json"))
    if not files:
        parts += ["Not yet measured: no GPU has run these benchmarks.", f"This fills the page:\n\n    {COMMAND}"]
        parts.append("and after it, `python -m evidence.gpu_page`. It is the machine's own GPU that speaks.")
    for file in files:
        record = Record.read(file)
        summary = f"../../bench/results/gpu/{file.parent.name}/summary.md"
        parts.append(f"## {record.environment['device']}\n\n[What failed, and all else]({summary})")
        parts += [f"### {title}\n\n{table}" for title, table in measured(record).items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.write_text(page(RESULTS))


if __name__ == "__main__":
    main()
