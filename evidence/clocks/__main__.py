"""Counts what each launch of a transformer block takes of a GPU's clocks; no GPU is needed and none is measured.

    python -m evidence.clocks [--targets sm_90,…] [--models tiny,…] [--suites inference,training]
                              [--precisions bf16,…] [--batch 256,…] [--checks] [--out FOLDER]

The launches are recorded from a swapped timm model through a stand-in for Triton's driver, and compiled. A row a launch
has its counted floor, its modelled time and what bounds each; a row a step has their sums beside the estimate of stock.
--checks compares the model with published measurements. --out writes clocks.md and clocks.json.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from deit_fast.check.targets import TARGETS
from evidence.clocks.block import Block, counted, recorded
from evidence.clocks.checks import checked
from evidence.clocks.page import page
from evidence.kernels import SPAWN, WORKERS, each_alone
from evidence.launches import MODELS, PRECISIONS, SUITES
from evidence.models import choices

DEFAULTS = {"targets": "sm_90,sm_80,sm_89", "models": "tiny,small,base", "precisions": "bf16", "batch": "256"}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m evidence.clocks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    blocks = [name for name in MODELS if not name.startswith("transformers-")]
    parser.add_argument("--targets", default=DEFAULTS["targets"], help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--models", default=DEFAULTS["models"], help=f"of {', '.join(blocks)}")
    parser.add_argument("--suites", default=",".join(SUITES), help=f"of {', '.join(SUITES)}")
    parser.add_argument("--precisions", default=DEFAULTS["precisions"], help=f"of {', '.join(PRECISIONS)}")
    parser.add_argument("--batch", default=DEFAULTS["batch"], help="one or several, 1,8,64,256")
    parser.add_argument("--checks", action="store_true", help="the model beside published measurements")
    parser.add_argument("--out", type=Path, help="folder for clocks.md and clocks.json")
    arguments = parser.parse_args()
    if arguments.out and not arguments.out.is_dir():
        raise SystemExit(f"--out must be a folder that exists, got {arguments.out}")
    suites = choices(arguments.suites, SUITES, "suite")
    batches = [int(batch) for batch in arguments.batch.split(",") if batch.isdecimal() and int(batch)]
    if len(batches) != len(arguments.batch.split(",")):
        raise SystemExit(f"--batch must be numbers from 1, got {arguments.batch}")
    wanted = [
        Block(target, model, precision, batch)
        for target in choices(arguments.targets, TARGETS, "target")
        for model in choices(arguments.models, tuple(blocks), "model")
        for precision in choices(arguments.precisions, PRECISIONS, "precision")
        for batch in batches
    ]
    launches = each_alone(recorded, [(block, suites) for block in wanted])
    found = []
    with ProcessPoolExecutor(WORKERS, mp_context=SPAWN) as pool:
        for block, of_block in zip(wanted, launches, strict=True):
            found.append((block, list(pool.map(partial(counted, block.target), of_block))))
        checks = pool.submit(checked).result() if arguments.checks else []
    text = page(found, checks)
    print(text)
    if arguments.out:
        rows = [asdict(block) | asdict(line) for block, lines in found for line in lines]
        body = ",\n".join(json.dumps(row) for row in rows)
        (arguments.out / "clocks.json").write_text(f"[\n{body}\n]\n")
        (arguments.out / "clocks.md").write_text(text)


if __name__ == "__main__":
    main()
