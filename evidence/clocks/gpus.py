"""The GPUs that launches are counted for: one for each target, by its data sheet and its maker's white papers."""

from dataclasses import dataclass

from deit_fast.benchmark.devices import Device, device
from deit_fast.check.targets import TARGETS, Target


@dataclass(frozen=True)
class Assumed:
    """What no data sheet has, by which a time is modelled (see `launch.modelled`).

    l2: GB/s from the L2 cache. first_load, cached_load: clocks until a load from memory, from L2 arrives.
    """

    l2: float
    first_load: float
    cached_load: float = 300


@dataclass(frozen=True)
class Gpu:
    """ghz: the clock to which its data sheet's peaks belong. fp32_lanes: of a quarter of a multiprocessor.
    fp32_products: TFLOP/s of float32 matrix products, None where the hardware has none.

    Peaks and bandwidth are `device`'s. assumed: None where no time is modelled.
    """

    name: str
    device: Device
    target: Target
    ghz: float
    fp32_lanes: int
    assumed: Assumed | None = None
    fp32_products: float | None = None

    @property
    def multiprocessors(self) -> int:
        return self.target.multiprocessors

    def flops(self, kind: str) -> float:
        """A multiprocessor's, a clock, of matrix products of `kind`: 16 bits, tf32, fp32."""
        peak = {"16 bits": self.device.bf16, "tf32": self.device.tf32, "fp32": self.fp32_products}[kind]
        if peak is None:
            raise ValueError(f"the {self.name} has no matrix products of {kind}")
        return peak * 1e12 / (self.multiprocessors * self.ghz * 1e9)

    def microseconds(self, clocks: float) -> float:
        return clocks / (self.ghz * 1e3)


def _gpu(
    name: str,
    torch_name: str,
    target: str,
    ghz: float,
    lanes: int,
    assumed: Assumed | None = None,
    fp32_products: float | None = None,
) -> Gpu:
    found = device(torch_name)
    if found is None:
        raise ValueError(f"no data sheet of {torch_name}")
    return Gpu(name, found, TARGETS[target], ghz, lanes, assumed, fp32_products)


# Clocks: NVIDIA's white papers of each architecture (the boost clock its peaks are computed with); AMD's data sheets
# (peak engine clock). gfx90a: the MI210, which is a die of the MI250. gfx1200 has no entry among the data sheets.
H200 = _gpu("H200", "NVIDIA H200", "sm_90", 1.83, 32, Assumed(10_000, 750))
H100 = _gpu("H100", "NVIDIA H100 80GB HBM3", "sm_90", 1.83, 32, Assumed(9_600, 700))
A100 = _gpu("A100", "NVIDIA A100-SXM4-80GB", "sm_80", 1.41, 16, Assumed(6_000, 550))
RTX_5090 = _gpu("RTX 5090", "NVIDIA GeForce RTX 5090", "sm_120", 2.407, 32)
RTX_4090 = _gpu("RTX 4090", "NVIDIA GeForce RTX 4090", "sm_89", 2.52, 32, Assumed(5_000, 800))
GPUS = {
    gpu.target.name: gpu
    for gpu in (
        A100,
        _gpu("RTX 3090", "NVIDIA GeForce RTX 3090", "sm_86", 1.695, 32),
        RTX_4090,
        H200,
        _gpu("B200", "NVIDIA B200", "sm_100", 1.86, 32),
        RTX_5090,
        _gpu("MI210", "AMD Instinct MI210", "gfx90a", 1.7, 16, fp32_products=45.3),
        _gpu("MI300X", "AMD Instinct MI300X", "gfx942", 2.1, 16, fp32_products=163.4),
        _gpu("MI355X", "AMD Instinct MI355X", "gfx950", 2.4, 16, fp32_products=157.3),
    )
}
