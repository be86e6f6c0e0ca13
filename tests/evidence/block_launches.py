"""Prints, as JSON for `test_gpu_page`, name and programs of a block's launches: as `deit-fast gpu` times them and as
`evidence.clocks` counts them.

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json

import torch

from deit_fast.benchmark.gpu.blocks import Shape, launch_block
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS
from deit_fast.ops import backend
from evidence.clocks.block import Block, recorded
from evidence.launches import SUITES

NAME, BATCH = "sm_90", 8


def main() -> None:
    torch.set_num_threads(1)
    with backend.forced("triton"), recording(TARGETS[NAME], compiling=False) as launches:
        for training in (False, True):
            launch_block(torch.device("cpu"), Shape(192, BATCH, training=training))
    timed = {(str(launch.metadata["name"]), launch.grid[0]) for launch in launches}
    counted = {(launch.name, launch.sizes.grid[0]) for launch in recorded(Block(NAME, "tiny", "bf16", BATCH), SUITES)}
    print(json.dumps({"timed": sorted(timed), "counted": sorted(counted)}))


if __name__ == "__main__":
    main()
