"""The one table of launch settings, by kernel, shape, dtype and architecture, and how a kernel is launched."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import NamedTuple

import torch
import triton
from triton.runtime import driver

from deit_fast.kernels import hardware, tf32
from deit_fast.kernels.hardware import (
    MMA_SYNC,
    NO_FLOAT32_PRODUCTS,
    SMALL_SHARED_MEMORY,
    WAVES_OF_32,
    WAVES_OF_64,
    is_amd,
)

_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
# The interpreter is quickest with the largest tiles.
_INTERPRETED_AS = "sm_90"


class Tile(NamedTuple):
    """A GEMM tile: `rows` × `columns` of the output, `depth` of the reduction a step."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


class AttentionTile(NamedTuple):
    queries: int
    keys: int
    num_warps: int
    num_stages: int


# Sums over rows: `depth` of them a program, `rows` a step; a few hundred programs at batch 32.
COLUMN_SUMS = Tile(rows=32, columns=64, depth=256, num_warps=4, num_stages=1)
# Whole rows of weight-sized tensors: `depth` is all there is.
FINISH_LINEAR = Tile(rows=4, columns=256, depth=0, num_warps=4, num_stages=1)
# Around a vendor's GEMM: every DeiT width is a multiple of 64.
RESIDUAL = Tile(rows=32, columns=64, depth=0, num_warps=4, num_stages=1)


class Cover(NamedTuple):
    """`width` as two powers of two, `head` + `tail`; `tail` is 0 where one is enough.

    Every DeiT width and head width is such a sum (192 = 128 + 64, 384 = 256 + 128, 80 = 64 + 16), so no lane of
    a tile is spent on padding; other widths are masked in the tail.
    """

    head: int
    tail: int


@lru_cache(maxsize=256)
def cover(width: int, least: int = 16) -> Cover:
    head = max(least, 1 << (width.bit_length() - 1))
    rest = width - head
    return Cover(head, max(least, triton.next_power_of_2(rest)) if rest > 0 else 0)


def tail_block(length: int, block: int, least: int = 16) -> int:
    """The power of two that covers what is left of `length` after whole blocks; 0 where nothing is."""
    rest = length % block
    return max(least, triton.next_power_of_2(rest)) if rest else 0


def interpreted() -> bool:
    return triton.knobs.runtime.interpret


def architecture(tensor: torch.Tensor) -> str:
    """`sm_90`, `gfx942`, …: the one whose settings this tensor's device takes."""
    if interpreted():
        return _INTERPRETED_AS
    arch = hardware.architecture(tensor.device)
    return hardware.family(arch) or arch


@lru_cache(maxsize=64)
def _multiprocessors(active_driver: object, device: int | None) -> int:
    return active_driver.utils.get_device_properties(device or 0)["multiprocessor_count"]


def multiprocessors(tensor: torch.Tensor) -> int:
    return 108 if interpreted() else _multiprocessors(driver.active, tensor.device.index)


def device_name(device: torch.device) -> str:
    """NVIDIA H100 80GB HBM3; the architecture where a stand-in takes a GPU's place."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return hardware.architecture(device)


@lru_cache(maxsize=1)
def driver_version() -> str:
    """Of the interface to CUDA's driver, 12080, or of ROCm; "none" where there is no driver."""
    if torch.version.hip:
        return torch.version.hip
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return "none"
    return str(version.value)


def no_kernels(tensor: torch.Tensor) -> str | None:
    """Why no kernel runs on this tensor's device, or None."""
    arch = _name(tensor)
    return None if arch is None or hardware.family(arch) else _lacking(f"no kernels for {arch}")


def no_products(weight: torch.Tensor) -> str | None:
    """Why no kernel multiplies matrices of weight's dtype on its device, or None."""
    arch = _name(weight)
    if weight.dtype is torch.float32 and arch is not None and hardware.family(arch) in NO_FLOAT32_PRODUCTS:
        return _lacking(f"{arch} has no matrix instructions for float32")
    return no_kernels(weight)


def _name(tensor: torch.Tensor) -> str | None:
    """Of its device; None in the interpreter, and where Triton has no driver, as the launch will say."""
    try:
        return None if interpreted() else hardware.architecture(tensor.device)
    except RuntimeError:
        return None


def _lacking(reason: str) -> str:
    hardware.lacking.add(reason)
    return reason


def no_separate_projections(weight: torch.Tensor) -> str | None:
    """Why no kernel takes q, k and v as three projections, by choosing among their pointers, or None."""
    if _TRITON < (3, 7) and not interpreted() and is_amd(architecture(weight)):
        return f"Triton {triton.__version__} does not compile three projections in one for AMD GPUs; Triton 3.7 does"
    return None


def splits_float32(tensor: torch.Tensor) -> bool:
    """Whether float32 products on this tensor's device are split into several of TF32."""
    return not interpreted() and not is_amd(architecture(tensor)) and not tf32.is_allowed()


def dot_precision(dtype: torch.dtype, arch: str) -> str:
    """How float32 dots run: TF32 only where the user allowed it, else three TF32 products that restore float32.

    AMD's matrix cores multiply float32 as it is.
    """
    if dtype is not torch.float32 or is_amd(arch):
        return "ieee"
    return "tf32" if tf32.is_allowed() else "tf32x3"


_thread = threading.local()


def setting(function: Callable) -> Callable:
    """A function of this table, in whose place `settings` may answer."""
    shipped = lru_cache(maxsize=1024)(function)

    @wraps(function)
    def chosen(*arguments):
        given = getattr(_thread, "settings", None)
        found = shipped(*arguments)
        if given is None:
            return found
        asked = f"{function.__name__}({', '.join(map(str, arguments))})"
        answers, answered = given
        if asked in answers:
            found = _like(found, answers[asked])
        answered[asked] = found
        return found

    return chosen


@contextmanager
def settings(chosen: dict[str, object]) -> Iterator[dict[str, object]]:
    """Within the block, in this thread, the table answers as `chosen` does where that knows what is asked.

    chosen: tiles, as such or by the names of their fields, by what is asked, "gemm(1152, 384, 2, sm_90, layer_norm)".
    Fills the dict that it gives with what was asked and answered.

    Raises:
        ValueError: when it is asked, if the tile in `chosen` has not the fields that the table's has.
    """
    outer = getattr(_thread, "settings", None)
    answered: dict[str, object] = {}
    _thread.settings = (chosen, answered)
    try:
        yield answered
    finally:
        _thread.settings = outer


def _like(shipped: object, given: object) -> object:
    """`given`, which may come from a file, as what `shipped` is."""
    if isinstance(given, dict):
        if set(given) != set(getattr(shipped, "_fields", ())):
            raise ValueError(f"a setting has {', '.join(given)}; the table has {shipped}")
        return type(shipped)(**given)
    if isinstance(given, list):
        if not isinstance(shipped, tuple) or len(given) != len(shipped):
            raise ValueError(f"a setting has {len(given)} parts; the table has {shipped}")
        return tuple(_like(part, other) for part, other in zip(shipped, given, strict=True))
    return given


@setting
def gemm(columns: int, depth: int, itemsize: int, arch: str, prologue: str) -> Tile | None:
    """The tile for an [M, depth] × [depth, columns] product with `prologue` applied as the left operand loads.

    None, which only `settings` answers, is the vendor's GEMM (kernels/vendor_gemm.py).
    """
    if itemsize == 4:
        if arch in MMA_SYNC:
            return Tile(64, 64 if arch == "sm_120" else 32, 32, 8, 2)
        return Tile(64, 64, 32, 8 if arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        # GELU, residual and an index beside a longer reduction step take all registers.
        return Tile(128, 64, 64 if prologue == "layer_norm" or (prologue == "none" and not is_amd(arch)) else 32, 8, 2)
    if prologue in ("gelu", "gelu_tanh"):
        return Tile(128, 64, 64, 8, 3)
    # The epilogue of a wider tile, out of sm_100's tensor memory all at once, takes more registers than there are.
    narrow = columns % 128 or (arch == "sm_100" and prologue == "none")
    return Tile(128, 64 if narrow else 128, 64, 8, 3)


@setting
def patch_embed(width: int, patch_width: int, depth: int, itemsize: int, arch: str) -> Tile:
    tile = gemm.__wrapped__(width, depth, itemsize, arch, "none")
    # The pixels of a patch whose width is no power of two are found one by one, with an address for each.
    return tile if patch_width % 16 == 0 else tile._replace(columns=min(64, tile.columns), depth=32, num_stages=2)


@setting
def mlp(width: int, arch: str) -> Tile:
    """The whole MLP in one kernel: `rows` stay on chip, `columns` of the hidden layer a step."""
    if arch in MMA_SYNC:
        return Tile(32, 32, width, 8, 2)
    if is_amd(arch):
        return Tile(32, 16 if arch in WAVES_OF_32 else 32, width, 4, 1)
    return Tile(64, 32, width, 8, 2)


@setting
def attention(head_dim: int, itemsize: int, arch: str) -> AttentionTile:
    if itemsize == 4:
        if arch in MMA_SYNC:
            # Three TF32 products for one leave no registers for wider tiles.
            return AttentionTile(16, 32, 4, 1)
        return AttentionTile(64, 32, 8 if arch == "sm_100" else 4, 1)
    return AttentionTile(64, 64, 4, 1 if is_amd(arch) else 2)


@setting
def attention_backward(head_dim: int, itemsize: int, arch: str) -> tuple[AttentionTile, AttentionTile]:
    """Tiles of the kernel that owns queries and of the one that owns keys.

    16 rows a warp: more warps than that compute the same rows again, except where the dots are tcgen05's.
    """
    if itemsize == 2:
        stages = 1 if is_amd(arch) else 2
        queries = 16 if head_dim > 64 and arch in WAVES_OF_32 else 32
        return AttentionTile(64, 32, 4, stages), AttentionTile(queries, 64, 4, stages)
    if head_dim > 80 and not is_amd(arch):
        # Split into what TF32 multiplies, 64 rows this wide fit neither in registers nor in shared memory.
        return AttentionTile(16, 32, 4, 1), AttentionTile(32, 16, 4, 1)
    num_warps = 8 if arch == "sm_100" else 4
    # There 64 keys spill, if only just.
    keys = 32 if arch in MMA_SYNC & SMALL_SHARED_MEMORY else 64
    return AttentionTile(64, 16, num_warps, 1), AttentionTile(16, keys, num_warps, 1)


@setting
def patch_embed_weight_gradient(rows: int, width: int, depth: int, itemsize: int, arch: str) -> tuple[Tile, int]:
    """The tile of gradᵀ [width, rows] × patches [rows, depth], and how many rows a program sums.

    The rows are split among some 256 programs, about two a multiprocessor, of 256 rows at least.
    """
    if itemsize == 4:
        tile = Tile(64, 64, 32, 8, 2)
    else:
        tile = Tile(128 if width % 128 == 0 else 64, 128, 32, 8, 2 if is_amd(arch) else 3)
    tiles = triton.cdiv(width, tile.rows) * triton.cdiv(depth, tile.columns)
    splits = max(1, min(256 // tiles, rows // 256))
    return tile, triton.cdiv(triton.cdiv(rows, splits), tile.depth) * tile.depth


@setting
def layer_norm_rows(width: int, itemsizes: tuple[int, ...], arch: str) -> tuple[int, int]:
    """Rows a program and its warps: 128 bits a thread of either tile of a row, about two thousand elements on chip."""
    head, tail = cover(width)
    # float32 beside 16 bits by half as many threads spills.
    warps = 4 if len(set(itemsizes)) == 1 and width <= 4096 else 8
    threads = warps * (64 if arch in WAVES_OF_64 else 32)
    rows = max(1, 2048 // triton.next_power_of_2(width), threads * 16 // (min(itemsizes) * (tail or head)))
    return rows, warps


@setting
def input_gradient(columns: int, itemsize: int, arch: str, activation: str) -> Tile:
    """The tile for an [M, depth] × [depth, columns] product, times the derivative of `activation`."""
    if itemsize == 4:
        return Tile(64, 32 if arch == "sm_100" else 64, 32, 8 if arch in MMA_SYNC or arch == "sm_100" else 4, 2)
    if arch in SMALL_SHARED_MEMORY:
        return Tile(128, 64, 64, 8, 2) if is_amd(arch) else Tile(128, 64, 32, 8, 3)
    # GELU's derivative beside a wider tile takes all registers, and with them the multiprocessor's second program.
    if activation != "none" and arch in MMA_SYNC:
        return Tile(128, 64, 32, 8, 4)
    return Tile(128, 128 if columns % 128 == 0 and activation == "none" else 64, 64, 8, 3)


@setting
def weight_gradient(
    out_features: int, in_features: int, itemsize: int, x_itemsize: int, arch: str, activation: str
) -> Tile:
    """The tile of an [out_features, in_features] gradient, `depth` of the tokens a step."""
    if itemsize == 4:
        return Tile(64, 64, 32, 8 if arch in MMA_SYNC else 4, 2)
    stages = 2 if arch in SMALL_SHARED_MEMORY else 3
    if activation != "none":
        # Every tile along out_features computes the activation anew, so they are as few as can be.
        rows = max(64, min(256, triton.next_power_of_2(out_features)))
        return Tile(rows, 64, 32, 8 if rows > 64 else 4, stages)
    rows, columns = (128 if n % 128 == 0 else 64 for n in (out_features, in_features))
    if rows * columns == 64 * 64:
        return Tile(rows, columns, 32, 4, 2)
    # mma.sync's operands are in registers: a float32 x, normalised, and what it is cast to side by side.
    in_registers = arch in MMA_SYNC or arch in WAVES_OF_32
    short = (rows * columns == 128 * 128 and stages == 2) or (x_itemsize > itemsize and in_registers)
    return Tile(rows, columns, 32 if short else 64, 8, stages)


@setting
def finish_layer_norm_linear(arch: str) -> Tile:
    """Whole columns of weight-sized tensors: `depth` is all there is."""
    rows, columns = (64, 16) if arch == "sm_120" else (128, 8)
    return Tile(rows, columns, 0, 4, 1)


class ReadoutTile(NamedTuple):
    """`queries` over `tokens` a step, rows of x as tiles `chunk` wide."""

    queries: int
    tokens: int
    chunk: int
    num_warps: int
    num_stages: int


def _readout_chunk(width: int) -> int:
    """128, or 64 where that pads a row less; the power of two that covers narrower rows."""
    chunk = min((128, 64), key=lambda chunk: triton.cdiv(width, chunk) * chunk)
    return min(chunk, max(16, triton.next_power_of_2(width)))


@setting
def readout(width: int, itemsize: int, arch: str) -> ReadoutTile:
    warps = 4 if (width <= 192 and itemsize == 2) or (is_amd(arch) and width > 384) else 8
    return ReadoutTile(16, 32 if width <= 384 else 16, _readout_chunk(width), warps, 1)


@setting
def readout_backward(width: int, queries: int, itemsize: int, arch: str) -> ReadoutTile:
    """The tokens are a program's.

    Few tiles of queries: the compiler's time grows with the square of the unrolled accesses, and more.
    """
    widest = 768 if is_amd(arch) else 1024
    if itemsize == 4:
        widest = 0 if arch in SMALL_SHARED_MEMORY or arch == "sm_100" else 192
    # Wide rows in narrow tiles: less of the next tile is under way at once.
    chunk = min(64, _readout_chunk(width)) if width > 512 else _readout_chunk(width)
    return ReadoutTile(32 if queries > 16 else 16, 32 if width <= widest else 16, chunk, 8, 1)


@lru_cache(maxsize=256)
def kept_weight_gradient(tile: Tile, itemsize: int, arch: str) -> Tile:
    """`tile` for rows that are found through an index, as drop path's kept samples are, of elements of `itemsize`."""
    if is_amd(arch):
        return tile
    # A pointer for each of the float32 rows that threads hold leaves a wider tile no registers.
    columns = min(tile.columns, 64) if itemsize == 4 and arch != "sm_90" else tile.columns
    # The index is as many steps ahead of its row as the row is of the product.
    return tile._replace(columns=columns, num_stages=2 * tile.num_stages - 1)


def splits(tiles: int, rows: int, multiprocessors: int) -> int:
    """Into how many parts the rows of a weight gradient of `tiles` tiles are split; a power of two up to 16.

    As many as fill the device once, but a part has a thousand rows: its partial sums are written and read.
    """
    most = max(1, min(16, multiprocessors // tiles, rows // 1024))
    return 1 << (most.bit_length() - 1)


@lru_cache(maxsize=64)
def loss_row(classes: int) -> tuple[int, int]:
    """Classes a step and warps, for a program that walks over one row of logits: 8 elements a thread."""
    block = min(2048, max(16, triton.next_power_of_2(classes)))
    return block, min(8, max(1, block // 256))


class Recorded(NamedTuple):
    """A launch that `run` has made: the arguments in the kernel's order; `compiled` is None in the interpreter."""

    compiled: object
    programs: int
    arguments: tuple
    device: int


@contextmanager
def recorded() -> Iterator[list[Recorded]]:
    """The list fills with this thread's launches within the block; a block around it has them afterwards."""
    outer = getattr(_thread, "launches", None)
    _thread.launches = inner = []
    try:
        yield inner
    finally:
        _thread.launches = outer
        if outer is not None:
            outer += inner


def run(kernel, programs: int, device: torch.device, *args, **options) -> None:
    """Launches `programs` programs on the tensors' own device (Triton would take the current one)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _run(kernel, programs, args, options)
    else:
        _run(kernel, programs, args, options)


def _run(kernel, programs: int, args: tuple, options: dict) -> None:
    compiled = kernel[(programs,)](*args, **options)
    launches = getattr(_thread, "launches", None)
    if launches is not None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        arguments = tuple(given[name] for name in kernel.arg_names)
        launches.append(Recorded(compiled, programs, arguments, driver.active.get_current_device()))
