"""What `deit-fast demo` runs in Triton's interpreter; the launches themselves run in `make demo`."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("timm")
pytest.importorskip("sklearn")

CODE = """
import json
from deit_fast.benchmark import interpreter_check
seen = []
found = interpreter_check.check(depth=1, on_launch=lambda launch, launches: seen.append([launch, launches]))
print(json.dumps({"found": found, "seen": seen}))
"""


def test_each_launch_is_announced_and_the_answer_is_stocks():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "DEIT_FAST_BACKEND": "triton"}
    process = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    result = json.loads(process.stdout.splitlines()[-1])
    found, launches = result["found"], result["found"]["launches"]
    assert found["difference"] < 1e-4 and launches > 0
    assert result["seen"] == [[launch, launches] for launch in range(1, launches + 1)]


@pytest.mark.parametrize(("seconds", "depth"), [(1.0, 12), (7.0, 6), (100.0, 2)])
def test_the_time_of_one_block_says_how_many_are_run(monkeypatch, capsys, seconds, depth):
    interpreter_check = pytest.importorskip("deit_fast.benchmark.interpreter_check")
    monkeypatch.setattr(interpreter_check, "block_seconds", lambda: seconds)
    monkeypatch.setattr(interpreter_check, "check", lambda depth, on_launch: {"blocks": depth})
    interpreter_check.main()
    assert json.loads(capsys.readouterr().out) == {"blocks": depth}
