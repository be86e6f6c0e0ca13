"""What a report of a failure must say about the machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import triton

from deit_fast import __version__


def environment(device: torch.device) -> dict[str, str]:
    """Versions, and the GPU where `device` is one."""
    found = {
        "deit_fast": __version__,
        "Triton": triton.__version__,
        "torch": f"{torch.__version__}, {_toolkit()}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
    }
    if device.type != "cuda":
        return {"device": "CPU, the kernels in Triton's interpreter", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": f"{properties.name}, {_architecture(properties)}, {properties.total_memory / 2**30:.1f} GiB, "
        f"{properties.multi_processor_count} multiprocessors",
        "driver": _driver(),
        **found,
    }


def interpreter_is_broken() -> bool:
    """Whether a tensor as a loop bound would be an error in Triton's interpreter."""
    triton_version, numpy_version = (
        tuple(map(int, version(package).split(".")[:2])) for package in ("triton", "numpy")
    )
    return triton_version < (3, 7) and numpy_version >= (2, 4)


def _toolkit() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "without GPU"


def _architecture(properties: Any) -> str:
    if torch.version.hip:
        return properties.gcnArchName
    return f"sm_{properties.major}{properties.minor}"


def _driver() -> str:
    """The driver's version, as its own tools tell it."""
    try:
        if torch.version.hip:
            return f"amdgpu {Path('/sys/module/amdgpu/version').read_text().strip()}"
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
        return f"NVIDIA {done.stdout.split()[0]}"
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"
