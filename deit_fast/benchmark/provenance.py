"""What a reader of a result needs, to judge it and to do it again: date, device, versions, clocks, commit, command."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch

from deit_fast.check.environment import environment
from deit_fast.ops.product_dtype import product_dtype


def provenance(device: torch.device, packages: Iterable[str] = ()) -> dict[str, str]:
    """By name. On a GPU with its clocks now and at most; on a CPU with its threads and 16-bit instructions.

    packages: the libraries that take part, by the names they are imported by.
    """
    found = environment(device)
    if device.type == "cuda":
        found["clocks"] = _clocks(device)
    else:
        found["device"] = processor()
    found["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**found, **_versions(packages), "commit": _commit(), "command": command()}


def command() -> str:
    return shlex.join(["deit-fast", *sys.argv[1:]])


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those installed."""
    distributions = packages_distributions()
    return {name: version(distributions[name][0]) for name in sorted(set(packages)) if name in distributions}


def processor() -> str:
    """This CPU, as far as it tells, and what decides how fast PyTorch is on it."""
    try:
        information = Path("/proc/cpuinfo").read_text()
    except OSError:
        information = ""
    names = [line.partition(":")[2].strip() for line in information.splitlines() if line.startswith("model name")]
    # x86: avx512_bf16, amx_bf16; Arm: bf16.
    instructions = sorted({flag for flag in information.split() if "bf16" in flag})
    multiplied = str(product_dtype(torch.empty(0, dtype=torch.bfloat16))).removeprefix("torch.")
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} processors; {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}; bfloat16 instructions: {', '.join(instructions) or 'none'}, "
        f"deit_fast multiplies bfloat16 matrices in {multiplied}; load average {os.getloadavg()[0]:.1f}"
    )


def _clocks(device: torch.device) -> str:
    if torch.version.hip:
        return "unknown"
    query = "clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={_index(device)}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{query.replace(',', ', ')}: {done.stdout.strip()}"


def _index(device: torch.device) -> str:
    """As nvidia-smi counts, whatever CUDA_VISIBLE_DEVICES leaves visible."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}"


def _commit() -> str:
    """Of the clone that this package runs from; "an installed package" where it is none."""
    folder = Path(__file__).parent
    try:
        # A clone of something else may lie around an installed package.
        tracked = ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__]
        subprocess.run(tracked, capture_output=True, check=True, timeout=30)
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "an installed package"
    return done.stdout.strip()
