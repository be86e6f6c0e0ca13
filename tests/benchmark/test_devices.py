"""A GPU's name finds its own row of the table of peaks, and no other GPU's."""

import pytest

from deit_fast.benchmark.devices import _DEVICES, device


@pytest.mark.parametrize(
    ("name", "found", "bf16", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80 GB", 312, 2039),
        ("A100-SXM4-40GB", "A100 SXM 40 GB", 312, 1555),  # older drivers leave the vendor out
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB", 312, 1935),
        ("NVIDIA A100-PCIE-40GB", "A100 PCIe 40 GB", 312, 1555),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5, 3350),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5, 2000),
        ("NVIDIA H100 NVL", "H100 NVL", 835.5, 3900),
        ("NVIDIA H200", "H200 SXM", 989.5, 4800),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5, 4800),
        ("NVIDIA B200", "B200", 2250, 7700),
        ("NVIDIA L4", "L4", 121, 300),
        ("NVIDIA L40S", "L40S", 362.05, 864),
        ("NVIDIA A10G", "A10G", 70, 600),
        ("NVIDIA GeForce RTX 3090", "RTX 3090", 71, 936),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2, 1008),
        ("NVIDIA GeForce RTX 5090", "RTX 5090", 209.5, 1792),
        ("AMD Instinct MI210", "MI210", 181, 1638.4),
        ("AMD Instinct MI250X", "MI250X, one die", 191.5, 1638.4),
        ("AMD Instinct MI300X", "MI300X", 1307.4, 5300),
        ("AMD Instinct MI300X VF", "MI300X", 1307.4, 5300),
        ("AMD Instinct MI325X", "MI325X", 1307.4, 6000),
        ("AMD Instinct MI355X", "MI355X", 2500, 8000),
    ],
)
def test_a_name_finds_its_gpu(name, found, bf16, bandwidth):
    gpu = device(name)
    assert (gpu.name, gpu.bf16, gpu.bandwidth) == (found, bf16, bandwidth)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA H800",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI250X/MI250",
        "AMD Instinct MI300A",
        "AMD Radeon Graphics",
    ],
)
def test_another_gpu_finds_none(name):
    assert device(name) is None


def test_every_peak_is_dense_and_in_its_unit():
    """A figure with sparsity is twice too high, GB for TB a thousand times; either shows in these ratios."""
    for gpu in _DEVICES.values():
        assert gpu.tf32 is None or gpu.tf32 == pytest.approx(gpu.bf16 / 2, rel=0.03), gpu.name
        assert 1 < gpu.bf16 / gpu.fp32 < 35, gpu.name
        assert 50 < 1000 * gpu.bf16 / gpu.bandwidth < 450, gpu.name
        assert gpu.source
