"""The command line itself."""

import pytest

import deit_fast
from deit_fast.cli import demo
from deit_fast.cli.main import main


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"deit-fast {deit_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["paint"], ["predict"], ["predict", "a.png", "--topk", "many"]])
def test_wrong_arguments_exit_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err


def test_a_missing_library_is_named_with_its_extra(capsys, monkeypatch):
    def missing(module, extra):
        raise ImportError(f'{module} is needed: pip install "deit_fast[{extra}]"')

    monkeypatch.setattr(demo, "require", missing)
    assert main(["demo"]) == 2
    assert "deit_fast[demo]" in capsys.readouterr().err


def test_errors_of_the_program_are_not_taken_for_the_users(monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(demo, "require", lambda *_, **__: None)
    monkeypatch.setattr(demo, "find_device", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["demo"])
