"""Compiles a linear layer, in 16 bits, for every GPU that takes another's settings.

Prints what came of it, as JSON for `test_hardware`. A program of its own because the test process has TRITON_INTERPRET
set.
"""

import json

import torch
from triton.backends.compiler import GPUTarget

from deit_fast import ops
from deit_fast.check.standin_driver import recording
from deit_fast.check.targets import TARGETS, Target
from deit_fast.kernels.launching import hardware
from deit_fast.ops import backend
from evidence.resources import resources


def target(arch: str) -> Target:
    """`arch`, with what one of its family has."""
    family = TARGETS[hardware.ALIKE[arch]]
    gpu = GPUTarget(family.gpu.backend, arch if family.is_amd else int(arch[3:]), family.gpu.warp_size)
    return Target(**vars(family) | {"name": arch, "gpu": gpu})


def compiled(arch: str) -> dict:
    with backend.forced("triton"), recording(target(arch)) as launches, torch.no_grad():
        for dtype in (torch.float16, torch.bfloat16):
            ops.linear(torch.zeros(4, 198, 384, dtype=dtype), torch.zeros(384, 384, dtype=dtype), None)
        name = hardware.device_name(torch.device("cpu"))
    found = [resources(each.compiled, each.target) for each in launches]
    return {
        "launches": len(found),
        "architecture": name,
        "spilled": [each.spilled for each in found],
        "matrix instructions": [bool(each.tensor_core) for each in found],
    }


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps({arch: compiled(arch) for arch in hardware.ALIKE}))


if __name__ == "__main__":
    main()
