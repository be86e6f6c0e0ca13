"""The launches of one transformer block of a swapped model, step by step, recorded and counted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from deit_fast.check.standin_driver import compile_launch, recording
from deit_fast.check.targets import TARGETS
from deit_fast.kernels.linear import vendor_gemm
from evidence.clocks import stock
from evidence.clocks.gpus import GPUS
from evidence.clocks.launch import Sizes, count, floor, modelled
from evidence.clocks.source import Uncounted
from evidence.launches import PRECISIONS, timm_model
from evidence.resources import resources

STEPS = {"inference": ("inference",), "training": ("forward", "backward")}


@dataclass(frozen=True)
class Block:
    """Which block: of a model of `evidence.launches.MODELS`, in a precision of its PRECISIONS, without drop path."""

    target: str
    model: str
    precision: str
    batch: int


@dataclass(frozen=True)
class Recorded:
    """A launch. name: as profilers show it; known_flops: its product's; binary: what `compile_launch` takes."""

    step: str
    kernel: str
    name: str
    known_flops: int
    binary: tuple[str, str]
    sizes: Sizes


@dataclass(frozen=True)
class ByVendor:
    """A product that is left to the vendor's GEMM. shape: its rows, columns and depth; bytes: of its three matrices."""

    step: str
    product: str
    shape: tuple[int, int, int]
    itemsize: int
    bytes: int


@dataclass(frozen=True)
class Line:
    """A launch, counted. Clocks are of one program, the mean of all; waves: how often the GPU is filled with programs.

    floor: µs, counted; modelled: µs, or None. uncounted: why there are no counts.
    """

    step: str
    kernel: str
    name: str
    programs: int
    known_flops: int
    registers: int
    spilled: int
    resident: int
    dram: int
    waves: float | None = None
    clocks: dict[str, float] | None = None
    flops: float | None = None
    l2: float | None = None
    floor: float | None = None
    floor_bound: str | None = None
    modelled: float | None = None
    modelled_bound: str | None = None
    uncounted: str | None = None


def recorded(block: Block, suites: Sequence[str]) -> list[Recorded | ByVendor]:
    """In order, but a step's products by the vendor's GEMM before its launches.

    In a process of its own, since the product remembers its device.
    """
    import deit_fast
    from deit_fast.ops import backend

    torch.set_num_threads(1)
    dtype, autocast = PRECISIONS[block.precision]
    # Two, since the last would be read out.
    model = timm_model(block.model, 2).to(torch.float32 if autocast else dtype)
    deit_fast.swap(model)
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    x = torch.zeros(block.batch, tokens, model.embed_dim, dtype=torch.float32 if autocast else dtype)
    found: list[Recorded | ByVendor] = []
    products: list[partial[ByVendor]] = []

    def multiply(product: str, a: Tensor, b: Tensor, out: Tensor, plus: Tensor | None = None) -> None:
        moved = sum(t.numel() * t.element_size() for t in (a, b, out))
        shape = (a.shape[0], b.shape[1], b.shape[0])
        products.append(partial(ByVendor, product=product, shape=shape, itemsize=a.element_size(), bytes=moved))

    with (
        backend.forced("triton"),
        recording(TARGETS[block.target], compiling=False) as launches,
        mock.patch.object(vendor_gemm, "multiply", multiply),
    ):

        def take(step: str) -> None:
            found.extend(product(step) for product in products)
            products.clear()
            for launch in launches:
                if launch.error is not None:
                    raise launch.error
                flops = sum(n for key, n in launch.metadata.items() if key.startswith("flops"))
                described = str(launch.metadata.get("name", launch.kernel))
                binary = (launch.function, launch.specialization)
                found.append(Recorded(step, launch.kernel, described, flops, binary, Sizes.of(launch)))
            launches.clear()

        if "inference" in suites:
            with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
                model.eval().blocks[0](x)
            take("inference")
        if "training" in suites:
            x.requires_grad_()
            with torch.autocast("cpu", dtype, enabled=autocast):
                y = model.train().blocks[0](x)
            take("forward")
            y.backward(torch.zeros_like(y))
            take("backward")
    return found


def by_vendor(target: str, launch: ByVendor) -> Line:
    """Its code is not counted: the floor is the data sheet's, and the time, where there is one, the heuristic's."""
    rows, columns, depth = launch.shape
    flops = 2 * rows * columns * depth
    name = f"vendor's GEMM, {launch.product} {rows}x{columns}x{depth}"
    line = Line(launch.step, "vendor's GEMM", name, 0, flops, 0, 0, 0, launch.bytes)
    if target not in GPUS or launch.itemsize != 2:
        return replace(line, uncounted="the vendor's, not counted")
    gpu = GPUS[target]
    times = {
        "tensor": gpu.microseconds(flops / gpu.flops("16 bits") / gpu.multiprocessors),
        "memory": launch.bytes / (gpu.device.bandwidth * 1e3),
    }
    bound = max(times, key=times.__getitem__)
    n, k = (rows, columns) if launch.product == "weight_gradient" else (columns, depth)
    # The heuristic was asked for as many tokens.
    tokens = depth if launch.product == "weight_gradient" else rows
    time = stock.by_vendor(gpu, launch.product, n, k, launch.itemsize) if tokens == stock.ROWS else None
    return replace(
        line,
        floor=times[bound],
        floor_bound=f"{bound}, data sheet: not counted",
        modelled=time,
        modelled_bound=None if time is None else "NVIDIA's heuristic",
    )


def counted(target: str, launch: Recorded | ByVendor) -> Line:
    """Compiles it. Runs in a worker."""
    if isinstance(launch, ByVendor):
        return by_vendor(target, launch)
    kernel = compile_launch(TARGETS[target], *launch.binary)
    taken = resources(kernel, TARGETS[target])
    line = Line(
        step=launch.step,
        kernel=launch.kernel,
        name=launch.name,
        programs=int(torch.tensor(launch.sizes.grid).prod()),
        known_flops=launch.known_flops,
        registers=taken.registers,
        spilled=taken.spilled,
        resident=taken.programs,
        dram=launch.sizes.bytes,
    )
    if target not in GPUS:
        return replace(line, uncounted="no data sheet of its GPU")
    gpu = GPUS[target]
    try:
        found = count(kernel, launch.sizes, gpu, taken.programs)
    except Uncounted as reason:
        return replace(line, uncounted=str(reason))
    lowest, bound = floor(found, gpu)
    time = modelled(found, gpu)
    return replace(
        line,
        waves=found.waves(gpu),
        clocks=found.average.clocks,
        flops=found.number * found.average.flops,
        l2=found.number * found.average.l2,
        floor=lowest,
        floor_bound=bound,
        modelled=time.microseconds if time else None,
        modelled_bound=time.bound if time else None,
    )
