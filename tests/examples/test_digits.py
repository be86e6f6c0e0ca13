"""examples/digits.yaml: its teacher and its student learn from the digits."""

from pathlib import Path

import pytest

pytest.importorskip("yaml")
pytest.importorskip("accelerate")

from deit_fast.cli.main import main
from deit_fast.train import digits


def test_the_commands_in_its_head_run(tmp_path, capsys):
    digits.write_folder(tmp_path / "digits", most=128)
    head = Path("examples/digits.yaml").read_text().partition("input_size")[0]
    for command in head.replace("\\\n#", "").replace("runs/", f"{tmp_path}/").splitlines():
        words = command.lstrip("# ").split()
        if words[:1] == ["deit-fast"]:
            words[words.index("digits")] = f"{tmp_path}/digits"
            assert main([*words[1:], "--epochs=1", "--warmup-epochs=0", "--num-workers=0"]) == 0
    assert "epoch 1: " in capsys.readouterr().out
