"""Programs whose kernels are compiled: the test process itself has TRITON_INTERPRET set."""

import json
import os
import subprocess
import sys


def printed_by(*arguments: str) -> object:
    """What Python with these arguments prints in its last line, read as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
