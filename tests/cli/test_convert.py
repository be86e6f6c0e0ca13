"""`deit-fast convert`, through `main` as the console script calls it."""

import pytest
import torch

from deit_fast.cli.main import main
from deit_fast.models import DeiTConfig, VisionTransformer


@pytest.fixture
def source(tmp_path):
    config = DeiTConfig(embed_dim=64, depth=2, num_heads=1, img_size=32, patch_size=8, num_classes=3, distilled=True)
    torch.save({"model": VisionTransformer(config).state_dict()}, tmp_path / "source.pth")
    return tmp_path / "source.pth"


def test_it_says_what_the_model_is_and_what_was_assumed(source, tmp_path, capsys):
    assert main(["convert", str(source), str(tmp_path / "there"), "--to", "transformers"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/there: distilled, width 64, 2 blocks, 1 attention heads, 32 x 32 pixels in patches of 8, "
        "3 classes",
        "Note: 1 attention heads, one for every 64 of the width 64: the checkpoint doesn't say how many",
    ]
    assert main(["convert", str(source), str(tmp_path / "two.pth"), "--to", "original", "--num-heads", "2"]) == 0
    assert "2 attention heads" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.pth", "there", "two.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("source.pth there", "the following arguments are required: --to"),
        ("source.pth there --to keras", "invalid choice: 'keras'"),
        ("source.pth there --to timm --heads 2", "unrecognized arguments: --heads"),
        ("source.pth there.pth --to timm", "the target for timm is a folder"),
        ("none.pth there --to timm", "no checkpoint at none.pth"),
        ("source.pth there --to timm --num-heads 5", "embed_dim must be a multiple of num_heads"),
        ("source.pth source.pth --to original", "source.pth is there already"),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(source, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    before = source.read_bytes()
    try:
        code = main(["convert", *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source] and source.read_bytes() == before


def test_the_help_is_read_on_one_screen(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 24
