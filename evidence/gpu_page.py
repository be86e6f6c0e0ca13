"""Writes evidence/results/gpu.md, the page of what was measured on GPUs.

    python -m evidence.gpu_page

A GPU's results are a folder in bench/results/gpu/, which `COMMAND` fills on a machine that has it. Each launch stands
beside what `evidence.clocks` predicts. evidence/results/clocks.json has three targets at batch 256; for another target,
or the batch of 64 of a smaller GPU, the folder gets a clocks.json of its own, on any machine:

    python -m evidence.clocks --targets sm_89 --batch 64 --out bench/results/gpu/NAME
"""

import json
from pathlib import Path
from statistics import median

from deit_fast.benchmark.gpu.record import Record
from deit_fast.benchmark.gpu.summary import measured
from deit_fast.benchmark.tables import table
from evidence.clocks.gpus import GPUS

PAGE = Path(__file__).with_name("results") / "gpu.md"
CLOCKS = PAGE.with_name("clocks.json")
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "gpu"
COMMAND = "deit-fast gpu --out bench/results/gpu/NAME"
TITLE = "Launches beside their prediction, the furthest above it first"


def page(folder: Path, clocks: Path = CLOCKS) -> str:
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
        tables = measured(record) | predicted(record, [clocks, file.with_name("clocks.json")])
        parts += [f"### {title}\n\n{found}" for title, found in tables.items()]
    return "\n\n".join(parts) + "\n"


def predicted(record: Record, clocks: list[Path]) -> dict[str, str]:
    """A table by its title, of launches both timed and counted, the furthest above their prediction first.

    clocks: what `evidence.clocks` has written; where two have a launch, the last one counts. A launch is the same where
    target, name (operator, shape, dtype and what is fused) and programs are.
    """
    target = next((name for name in GPUS if name in record.environment["device"]), None)
    lines = {
        (line["name"], line["programs"]): line
        for file in clocks
        if file.exists()
        for line in json.loads(file.read_text())
        if line["target"] == target and line["floor"] is not None
    }
    fastest: dict[tuple[str, int], float] = {}
    for entry in record.of("launches"):
        for launch in entry.result["launches"] if entry.result else ():
            key = launch["name"], launch["programs"]
            if key in lines:
                fastest[key] = min(1e6 * launch["seconds"], fastest.get(key, float("inf")))
    if target is None or not fastest:
        return {}
    # Where no time is modelled, the floor is all that is predicted.
    ratios = {key: time / (lines[key]["modelled"] or lines[key]["floor"]) for key, time in fastest.items()}
    rows = []
    for key in sorted(ratios, key=ratios.__getitem__, reverse=True):
        line = lines[key]
        times = (line["floor"], line["modelled"], fastest[key])
        bound = line["modelled_bound"] or line["floor_bound"]
        rows.append((*key, *("–" if time is None else f"{time:.1f}" for time in times), f"{ratios[key]:.2f}", bound))
    figures = ("programs:", "floor µs, counted:", "µs, modelled:", "µs, measured:", "measured / predicted:")
    about = (
        f"Counted and modelled for the {GPUS[target].name}, without a GPU ([how](clocks.md)). The median launch takes "
        f"{median(ratios.values()):.2f} of what is predicted: the modelled time, or the floor where there is none."
    )
    return {TITLE: f"{about}\n\n{table(('launch', *figures, 'bound by'), rows)}"}


def main() -> None:
    PAGE.write_text(page(RESULTS))


if __name__ == "__main__":
    main()
