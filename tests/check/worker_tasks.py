"""What `test_workers` has done in processes of their own."""

import os
import signal
import sys
import time
from collections.abc import Callable

import torch

from deit_fast.ops import backend


def act(task: str, tell: Callable[[object], None]) -> object:
    """Does as it is told; the answer says in which process."""
    tell(f"begins: {task}")
    if task == "raise":
        print("about to raise")
        raise ValueError("no such shape\nand more")
    if task == "crash":
        print("about to crash", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    if task == "exit":
        os._exit(3)
    if task == "hang":
        print("about to hang", flush=True)
        time.sleep(600)
    if task == "lose the device":
        torch.cuda.is_initialized = lambda: True
        backend.device_error = lambda error, device: error
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return task, os.getpid()
