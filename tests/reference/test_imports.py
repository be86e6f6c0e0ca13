import subprocess
import sys

OTHERS = "{'deit_fast', 'timm', 'transformers', 'numpy', 'triton'}"


def imported_by(package):
    probe = f"import {package}, sys; print(sorted({OTHERS} & set(sys.modules)))"
    command = [sys.executable, "-c", probe]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_reference_imports_nothing_but_torch():
    assert imported_by("reference") == imported_by("torch")
