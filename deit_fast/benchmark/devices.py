"""What GPUs can do at most, by their vendors' data sheets: nothing here was measured."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Published peaks of one GPU, matrices dense.

    bf16: TFLOP/s of bfloat16 and float16 matrix products that add up in float32. tf32: TFLOP/s of TF32 ones, None
    where the hardware has none. fp32: TFLOP/s without tensor cores. bandwidth: GB/s of memory, 10⁹ bytes a GB.
    source: the data sheet.
    """

    name: str
    bf16: float
    tf32: float | None
    fp32: float
    bandwidth: float
    source: str


_A100 = "NVIDIA A100 Tensor Core GPU data sheet"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet"
_B200 = "NVIDIA Blackwell data sheet, HGX B200"
_L4 = "NVIDIA L4 Tensor Core GPU data sheet"
_L40S = "NVIDIA L40S data sheet"
_A10G = "NVIDIA A10G data sheet"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture white paper"
_ADA = "NVIDIA Ada GPU Architecture white paper"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture white paper"
_MI200 = "AMD Instinct MI200 Series Accelerator data sheet"
_MI210 = "AMD Instinct MI210 Accelerator brochure"
_MI300X = "AMD Instinct MI300X Accelerator data sheet"
_MI325X = "AMD Instinct MI325X Accelerator data sheet"
_MI355X = "AMD Instinct MI355X GPU data sheet"

# How a name ends, as a regular expression, the more specific first. Ends, because what follows is another GPU or a part
# of one: Laptop GPU, Ti, D, MIG 1g.5gb. Halved is what a data sheet prints with sparsity, or for two dies. A name that
# AMD's driver gives to two cards, MI250X/MI250, is neither.
_DEVICES = {
    r"A100-SXM4?-80GB": Device("A100 SXM 80 GB", 312, 156, 19.5, 2039, _A100),
    r"A100-SXM4?-40GB": Device("A100 SXM 40 GB", 312, 156, 19.5, 1555, _A100),
    r"A100(-PCIE-80GB| 80GB PCIe)": Device("A100 PCIe 80 GB", 312, 156, 19.5, 1935, _A100),
    r"A100-PCIE-40GB": Device("A100 PCIe 40 GB", 312, 156, 19.5, 1555, _A100),
    r"H100 80GB HBM3": Device("H100 SXM", 1979 / 2, 989 / 2, 67, 3350, _H100),
    r"H100 NVL": Device("H100 NVL", 1671 / 2, 835 / 2, 60, 3900, _H100),
    r"H100 PCIe": Device("H100 PCIe", 1513 / 2, 756 / 2, 51, 2000, _H100),
    r"H200 NVL": Device("H200 NVL", 1671 / 2, 835 / 2, 60, 4800, _H200),
    r"H200": Device("H200 SXM", 1979 / 2, 989 / 2, 67, 4800, _H200),
    r"B200": Device("B200", 4500 / 2, 2200 / 2, 75, 7700, _B200),
    r"L40S": Device("L40S", 362.05, 183, 91.6, 864, _L40S),
    r"L4": Device("L4", 242 / 2, 120 / 2, 30.3, 300, _L4),
    r"A10G": Device("A10G", 70, 35, 35, 600, _A10G),
    r"RTX 3090": Device("RTX 3090", 71, 35.6, 35.6, 936, _GA102),
    r"RTX 4090": Device("RTX 4090", 165.2, 82.6, 82.6, 1008, _ADA),
    r"RTX 5090": Device("RTX 5090", 209.5, 104.8, 104.8, 1792, _RTX_BLACKWELL),
    r"MI210": Device("MI210", 181, None, 22.6, 1638.4, _MI210),
    r"MI250X": Device("MI250X, one die", 383 / 2, None, 47.9 / 2, 3276.8 / 2, _MI200),
    r"MI300X( OAM| VF)?": Device("MI300X", 1307.4, 653.7, 163.4, 5300, _MI300X),
    r"MI325X( OAM| VF)?": Device("MI325X", 1307.4, 653.7, 163.4, 6000, _MI325X),
    r"MI355X( OAM| VF)?": Device("MI355X", 2500, None, 157.3, 8000, _MI355X),
}


def device(name: str) -> Device | None:
    """The GPU that `torch.cuda.get_device_name()` calls `name`; None for one that is not in the table."""
    return next((found for pattern, found in _DEVICES.items() if re.search(rf"\b(?:{pattern})$", name)), None)
