"""Runs toy kernels through the stand-in driver; prints what it saw as JSON for `test_standin_driver`.

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from deit_fast.check.standin_driver import RecordedLaunch, recording
from deit_fast.check.targets import TARGETS
from evidence.resources import resources


def metadata(grid: tuple, compiled: object, arguments: dict) -> dict:
    return {"name": f"product of {arguments['K']}", "flops16": 2 * arguments["a_ptr"].numel()}


@triton.jit(launch_metadata=metadata)
def product_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + n[None, :] * K + (start + k)[:, None])
        total = tl.dot(a, b, total)
    tl.store(c_ptr + m[:, None] * BLOCK_N + n[None, :], total.to(c_ptr.dtype.element_ty))


@triton.jit
def faulty_kernel(x_ptr, N: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, N), 0)


def launch_product(block: int, dtype: torch.dtype = torch.bfloat16, stages: int = 2, **options) -> None:
    a, b, c = (torch.zeros(block, n, dtype=dtype) for n in (256, 256, block))
    product_kernel[(3, 2)](a, b, c, 256, block, block, 64, num_warps=4, num_stages=stages, **options)


def describe(launch: RecordedLaunch) -> dict:
    if launch.error is not None:
        return {"kernel": launch.kernel, "error": str(launch.error)}
    return {
        "kernel": launch.kernel,
        "target": launch.target.name,
        "grid": launch.grid,
        "tensors": {name: [list(shape), str(dtype)] for name, (shape, dtype) in launch.tensors.items()},
        "scalars": launch.scalars,
        "metadata": launch.metadata,
        "constexprs": launch.constexprs,
        "binary": next(kind for kind in ("cubin", "hsaco") if kind in launch.compiled.asm),
        **vars(resources(launch.compiled, launch.target)),
    }


def main() -> None:
    before = driver._active
    seen = {}
    for name in ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1200"):
        with recording(TARGETS[name]) as launches:
            launch_product(64)
            launch_product(64)
        seen[name] = [describe(launch) for launch in launches]
    seen["keys"] = len({launch.key for launch in launches})

    with recording(TARGETS["sm_90"]) as launches:
        faulty_kernel[(1,)](torch.zeros(3), 3)
        launch_product(128, stages=8)  # too much shared memory
        launch_product(128, maxnreg=96)  # spills
    seen["faults"] = [describe(launch) for launch in launches]

    with recording(TARGETS["gfx942"]) as launches:
        launch_product(2, torch.float16)  # no matrix instruction is that small
    seen["scalar"] = [describe(launch) for launch in launches]
    seen["restored"] = driver._active is before
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
