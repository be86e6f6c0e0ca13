"""The model beside what others have measured and published: how far off it is.

Their kernels, as near as their texts tell, are compiled here: the matrix product of Triton's tutorial, in float16, and
our own attention at their sizes. The model's constants were set by hand to meet the first four (`launch`), and the
stock estimate's to meet the last three: the others alone are independent of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from deit_fast.check.standin_driver import RecordedLaunch, recording
from deit_fast.kernels.attention import attention
from deit_fast.kernels.attention.settings import AttentionTile
from deit_fast.kernels.launching.settings import settings
from evidence.clocks import stock
from evidence.clocks.gpus import H100, RTX_5090, Gpu
from evidence.clocks.launch import Sizes, count, modelled
from evidence.resources import resources


@triton.jit
def matmul_kernel(
    a_ptr,  # [m, k]
    b_ptr,  # [k, n]
    c_ptr,  # [m, n]
    m,
    n,
    k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """c = a b, as in Triton's tutorial on matrix multiplication."""
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    group = tl.program_id(0) // (GROUP * column_tiles)
    group_rows = min(row_tiles - group * GROUP, GROUP)
    tile = tl.program_id(0) % (GROUP * column_tiles)
    row = ((group * GROUP + tile % group_rows) * ROWS + tl.arange(0, ROWS)) % m
    column = (tile // group_rows * COLUMNS + tl.arange(0, COLUMNS)) % n
    depth = tl.arange(0, DEPTH)
    a_ptrs = a_ptr + row[:, None] * k + depth[None, :]
    b_ptrs = b_ptr + depth[:, None] * n + column[None, :]
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        a = tl.load(a_ptrs, mask=depth[None, :] < k - start, other=0.0)
        b = tl.load(b_ptrs, mask=depth[:, None] < k - start, other=0.0)
        product = tl.dot(a, b, product)
        a_ptrs += DEPTH
        b_ptrs += DEPTH * n
    c_ptrs = c_ptr + row[:, None] * n + column[None, :]
    tl.store(c_ptrs, product.to(tl.float16), mask=(row < m)[:, None] & (column < n)[None, :])


def modelled_tflops(gpu: Gpu, shape: tuple[int, int, int], tile: tuple[int, int, int, int, int]) -> float:
    """Of the tutorial's product [m, k] [k, n] in float16. Needs a process without TRITON_INTERPRET."""
    m, n, k = shape
    rows, columns, depth, warps, stages = tile
    programs = triton.cdiv(m, rows) * triton.cdiv(n, columns)
    operand = torch.empty(1, dtype=torch.float16)
    with recording(gpu.target) as launches:
        a, b, c = (operand.expand(size) for size in ((m, k), (k, n), (m, n)))
        matmul_kernel[(programs,)](a, b, c, m, n, k, rows, columns, depth, 8, num_warps=warps, num_stages=stages)
    (launch,) = launches
    return 2 * m * n * k / _microseconds(launch, gpu) / 1e6


def modelled_attention_tflops(gpu: Gpu, batch: int, heads: int, tokens: int) -> float:
    """Of our attention kernel at heads of 64 in bfloat16, with tiles of 128 queries. As above."""
    tile = AttentionTile(128, 64, 4, 3)
    qkv = torch.empty(1, dtype=torch.bfloat16).expand(batch, tokens, heads, 64)
    with recording(gpu.target) as launches, settings({f"attention(64, 2, {gpu.target.name})": tile}):
        attention([qkv] * 3, 0.125)
    (launch,) = launches
    return 4 * batch * heads * tokens**2 * 64 / _microseconds(launch, gpu) / 1e6


def _microseconds(launch: RecordedLaunch, gpu: Gpu) -> float:
    if launch.compiled is None:
        raise RuntimeError(f"{launch.kernel} does not compile") from launch.error
    taken = resources(launch.compiled, gpu.target)
    time = modelled(count(launch.compiled, Sizes.of(launch), gpu, taken.programs), gpu)
    if time is None:
        raise ValueError(f"no time is modelled for the {gpu.name}")
    return time.microseconds


def _estimated_stock(width: int) -> float:
    return stock.estimate(RTX_5090, width)["inference"]


def _published_by_timm(width: int) -> float:
    """µs a block of the RTX 5090 with `torch.compile`, of images a second at batch 1024, 12 blocks a model."""
    return 1e6 * stock.BATCH / {192: 32_757, 384: 13_256, 768: 4_369}[width] / 12


@dataclass(frozen=True)
class Check:
    """A figure that others have published, in `unit`; model: what ours says in its place."""

    what: str
    gpu: str
    published: float
    unit: str
    source: str
    model: Callable[[], float]


_TILE = (128, 256, 64, 8, 3)
_TRITON, _TLX = "triton-lang/triton pull request 5726", "facebookexperimental/triton pull request 1038"
_FA3 = "FlashAttention-3 paper"
_SHORT = partial(modelled_tflops, H100, (8192, 8192, 512), _TILE)
CHECKS = [
    Check(what, "H100", published, "TFLOP/s", source, model)
    for what, published, source, model in (
        ("product 8192³", 670, "tritonbench pull request 894", partial(modelled_tflops, H100, (8192,) * 3, _TILE)),
        ("product 65536×1024×1024", 502, _TLX, partial(modelled_tflops, H100, (65536, 1024, 1024), _TILE)),
        ("attention, 16,384 tokens", 403, _FA3, partial(modelled_attention_tflops, H100, 1, 32, 16384)),
        ("attention, 512 tokens", 340, _FA3, partial(modelled_attention_tflops, H100, 32, 32, 512)),
        ("product 8192×8192, K = 512", 217, f"{_TRITON}, Triton", _SHORT),
        ("the same", 285, f"{_TRITON}, vendor's GEMM", _SHORT),
    )
] + [
    Check(
        f"stock block, D = {width}, compiled", "RTX 5090", _published_by_timm(width), "µs", "timm's tables, a 12th",
        partial(_estimated_stock, width),
    )
    for width in (192, 384, 768)
]  # fmt: skip


def checked() -> list[tuple[Check, float]]:
    """Each check with what the model says now. Needs a process without TRITON_INTERPRET."""
    return [(check, check.model()) for check in CHECKS]
