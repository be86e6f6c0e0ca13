"""`deit-fast demo` as a whole; its two halves have tests of their own."""

import pytest

from deit_fast.cli import demo, demo_inference, demo_training
from deit_fast.cli.main import main


@pytest.fixture
def halves(monkeypatch):
    """Sets what each half answers; returns the folder that training was given."""

    def answer(agree: bool, learnt: bool) -> list:
        folders = []
        monkeypatch.setattr(demo_inference, "run", lambda console, device: agree)
        monkeypatch.setattr(demo_training, "run", lambda console, device, out: folders.append(out) or learnt)
        return folders

    return answer


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("learnt", [True, False])
def test_the_exit_code_says_whether_both_halves_passed(capsys, tmp_path, halves, agree, learnt):
    folders = halves(agree, learnt)
    out = tmp_path / "a" / "b"
    assert main(["demo", "--out", str(out)]) == (0 if agree and learnt else 1)
    assert folders == [out] and out.is_dir() and not list(out.iterdir())
    text = capsys.readouterr().out
    assert ("Every answer agrees" in text) is agree and ("learn alike" in text) is learnt


def test_outputs_go_to_the_current_folder_by_default(tmp_path, halves, monkeypatch):
    monkeypatch.chdir(tmp_path)
    halves(True, True)
    assert main(["demo"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["deit-fast-demo"]


@pytest.mark.parametrize("below", [(), ("inside",)], ids=["a file", "below a file"])
def test_an_unusable_folder_is_an_error_before_any_work(capsys, tmp_path, monkeypatch, below):
    monkeypatch.setattr(demo, "find_device", lambda _: pytest.fail("work began"))
    (tmp_path / "file").write_text("")
    out = tmp_path.joinpath("file", *below)
    assert main(["demo", "--out", str(out)]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.startswith(f"deit-fast: error: --out {out} ") and stderr.count("\n") == 1
