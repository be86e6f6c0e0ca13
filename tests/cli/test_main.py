"""The command line itself."""

import re
import subprocess
import sys

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


def test_each_commands_help_is_read_on_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")

    def shown(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main([*arguments, "--help"])
        return capsys.readouterr().out

    commands = re.findall(r"^    (\w+) ", shown(), re.MULTILINE)
    assert len(commands) >= 13
    for command in commands:
        assert len(shown(command).splitlines()) <= 50, command


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


def test_a_reader_that_has_read_enough_is_no_traceback():
    program = (
        "import sys; from deit_fast.cli import check, main; "
        "check.run = lambda args: print('x' * 10**6) or 0; sys.exit(main.main(['check']))"
    )
    command = f'"{sys.executable}" -c "{program}" | head -c 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout == "x" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
