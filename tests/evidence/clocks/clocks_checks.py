"""Compiles a product through the stand-in driver and prints its counts as JSON, for `test_counts`.

A program of its own because the test process has TRITON_INTERPRET set.
"""

import json

import torch
import triton
import triton.language as tl

from deit_fast.check.standin_driver import recording
from evidence.clocks.gpus import GPUS, Gpu
from evidence.clocks.launch import Sizes, count, floor, modelled
from evidence.resources import resources

TILE = 128
DEPTH = 64


@triton.jit
def product_kernel(
    a_ptr,  # [m, k]
    b_ptr,  # [n, k]
    c_ptr,  # [m, n]
    m,
    n,
    k,
    GELU: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """c = gelu(a bᵀ); a program past the last tile writes nothing."""
    columns = tl.cdiv(n, TILE)
    if tl.program_id(0) < tl.cdiv(m, TILE) * columns:
        row = tl.program_id(0) // columns * TILE + tl.arange(0, TILE)
        column = tl.program_id(0) % columns * TILE + tl.arange(0, TILE)
        product = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, k, DEPTH):
            depth = start + tl.arange(0, DEPTH)
            a = tl.load(a_ptr + row[:, None] * k + depth[None, :], mask=row[:, None] < m, other=0.0)
            b = tl.load(b_ptr + column[None, :] * k + depth[:, None], mask=column[None, :] < n, other=0.0)
            product = tl.dot(a, b, product)
        if GELU:
            product *= tl.sigmoid(1.702 * product)
        mask = (row < m)[:, None] & (column < n)[None, :]
        tl.store(c_ptr + row[:, None] * n + column[None, :], product.to(c_ptr.dtype.element_ty), mask=mask)


def counts(gpu: Gpu, m: int, n: int, k: int, gelu: bool = False, idle: int = 0) -> dict:
    a, b, c = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((m, k), (n, k), (m, n)))
    programs = triton.cdiv(m, TILE) * triton.cdiv(n, TILE) + idle
    with recording(gpu.target) as launches:
        product_kernel[(programs,)](a, b, c, m, n, k, gelu, TILE, DEPTH, num_warps=8)
    (launch,) = launches
    found = count(launch.compiled, Sizes.of(launch), gpu, resources(launch.compiled, gpu.target).programs)
    time = modelled(found, gpu)
    return {
        "flops": found.number * found.average.flops,
        "kinds": sorted(found.programs.values()),
        "clocks": found.average.clocks,
        "dram": found.dram,
        "floor": floor(found, gpu)[0],
        "modelled": time and time.microseconds,
    }


def main() -> None:
    h200 = GPUS["sm_90"]
    print(
        json.dumps(
            {
                "plain": counts(h200, 1024, 256, 512),
                "gelu": counts(h200, 1024, 256, 512, gelu=True),
                "idle": counts(h200, 1024, 256, 512, idle=5),
                "ragged": counts(h200, 1000, 256, 512),
                "rows": [counts(h200, rows, 256, 512)["floor"] for rows in (200, 1024, 50_000)],
                "a100": counts(GPUS["sm_80"], 1024, 256, 512),
                "b200": counts(GPUS["sm_100"], 1024, 256, 512),
                "mi300x": counts(GPUS["gfx942"], 1024, 256, 512),
            }
        )
    )


if __name__ == "__main__":
    main()
