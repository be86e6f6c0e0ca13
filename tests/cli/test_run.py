"""`deit-fast run`: a script as Python runs it, its models swapped."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BUILDS = """
import sys
import timm, torch
torch.manual_seed(0)
model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, depth=2).eval()
images = torch.randn(2, 3, 32, 32)
with torch.no_grad():
    torch.save(model(images), sys.argv[1])
"""
SHOWS = """
import json, sys
import helper
print(json.dumps([sys.argv, __name__, sys.path[0], helper.HERE]))
sys.exit(3)
"""


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deit_fast", "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(BUILDS)
    return tmp_path / "script.py"


def test_the_model_is_swapped_and_answers_as_it_does_without(script, tmp_path):
    done = run("--report", script, tmp_path / "swapped.pt")
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, script, tmp_path / "stock.pt"], check=True)
    swapped, stock = (torch.load(tmp_path / name) for name in ("swapped.pt", "stock.pt"))
    torch.testing.assert_close(swapped, stock, rtol=0, atol=2e-5)
    assert done.stdout == ""
    assert "VisionTransformerDistilled: 13 modules swapped\n" in done.stderr
    calls = done.stderr.partition("calls of VisionTransformerDistilled")[2]
    assert "blocks.0-1 " in calls
    assert re.search(r"^\(model\) +VisionTransformerDistilled +1 +1 +0$", calls, re.MULTILINE), "it ran on stock code"


def test_one_line_says_what_was_swapped(script, tmp_path):
    done = run(script, tmp_path / "out.pt")
    assert done.stderr == "deit-fast run: VisionTransformerDistilled: 13 modules swapped\n"


def test_of_several_processes_the_first_speaks(script, tmp_path):
    assert run(script, tmp_path / "out.pt", RANK="1").stderr == ""


@pytest.mark.parametrize("kind", ["script", "module"])
def test_it_runs_as_under_python(tmp_path, monkeypatch, kind):
    (tmp_path / "shows.py").write_text(SHOWS)
    (tmp_path / "helper.py").write_text("HERE = 1")
    monkeypatch.chdir(tmp_path)
    name = ("shows.py",) if kind == "script" else ("-m", "shows")
    arguments = ("--report", "-m", "--help")
    done = run(*name, *arguments)
    plain = subprocess.run([sys.executable, *name, *arguments], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (plain.stdout, plain.returncode)
    assert plain.returncode == 3
    assert done.stderr == f"deit-fast run: {name[-1]} built no DeiT or ViT; nothing was swapped\n"


def test_a_model_of_a_library_too_old_stays_and_it_is_said(tmp_path):
    too_old = "from timm.models import vision_transformer\nvision_transformer.Block.forward = lambda self, x: x\n"
    (tmp_path / "script.py").write_text(too_old + BUILDS)
    done = run(tmp_path / "script.py", tmp_path / "out.pt")
    assert done.returncode == 0
    assert "VisionTransformerDistilled stays as it is: deit_fast.swap needs timm 1.0.31 or newer, found" in done.stderr


OF_OLD = {
    "__init__.py": "__version__ = '0.4.12'",
    "models/__init__.py": "from .factory import create_model",
    "models/factory.py": "from torch import nn\nfrom timm.models.vision_transformer import Block\n"
    "def create_model(name):\n    return nn.Sequential(Block())",
    "models/vision_transformer.py": "from torch import nn\nclass VisionTransformer(nn.Module): pass\n"
    "class Block(nn.Module):\n    def forward(self, x): return x",
}


def test_the_timm_of_the_original_repository_is_called_too_old(tmp_path):
    for name, text in OF_OLD.items():
        (tmp_path / "timm" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "timm" / name).write_text(text)
    (tmp_path / "script.py").write_text("from timm.models import create_model\ncreate_model('any')")
    done = run(tmp_path / "script.py")
    assert done.returncode == 0, done.stderr
    assert "stays as it is: deit_fast.swap needs timm 1.0.31 or newer, found 0.4.12" in done.stderr


def test_an_error_of_the_script_is_its_own(tmp_path):
    (tmp_path / "fails.py").write_text("raise ValueError('of the script')")
    done = run(tmp_path / "fails.py")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("ValueError: of the script")


def test_a_script_that_is_not_there_is_refused(tmp_path):
    done = run(tmp_path / "none.py")
    assert done.returncode == 2 and "there is no script" in done.stderr and "Traceback" not in done.stderr


def test_it_runs_under_torchrun(script, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "deit_fast", "run", str(script), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("13 modules swapped") == 1
