"""Programs in a process of their own, where a library that is installed can't be found."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The first lines of such a program; format it with `library`.
WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == {library!r} else find(name, *rest)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
"""


def printed(code: str) -> str:
    """What it prints, its error included."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done.stdout + done.stderr
