"""What the documentation names is there: links, make targets, commands, modules, files, names of the package."""

import ast
import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from deit_fast.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FORMS = sorted((ROOT / ".github").rglob("*.*"))
FOLDERS = ("deit_fast", "reference", "evidence", "examples", "bench", "tests", "docs")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_text = pytest.mark.parametrize("text", [*PAGES, *FORMS], ids=lambda page: page.name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def code(page: Path) -> list[str]:
    """What stands in a shell block, without comments, or between backticks."""
    text = page.read_text()
    lines = [line.partition("#")[0] for block in blocks(page, "sh") for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", text.replace("```", ""))


def anchors(page: Path) -> set[str]:
    """The headings of a page, as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_text
def test_make_has_each_target(text):
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    for line in code(text):
        if line.startswith("make "):
            assert {word for word in line.split()[1:] if "=" not in word} <= targets, line


@each_text
def test_deit_fast_has_each_command_and_option(text, capsys):
    for line in code(text):
        words = line.removeprefix(".venv/bin/").split()
        if words[:1] != ["deit-fast"] or len(words) == 1 or words[1].startswith(("run", "COMMAND")):
            continue
        with pytest.raises(SystemExit) as stop:
            main([words[1], "--help"])
        assert stop.value.code == 0, line
        explained = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in explained, line


@each_text
def test_each_module_that_is_run_is_there(text):
    for name in re.findall(r"python -m ([\w.]+)", text.read_text()):
        assert find_spec(name.rstrip(".")), name


@each_text
def test_each_file_that_is_named_is_there(text):
    for name in code(text):
        path = name.split()[0] if name.split() else ""
        if path.startswith(tuple(f"{folder}/" for folder in FOLDERS)) and not re.search(r"[<*>]|NAME", path):
            assert (ROOT / path).exists() or path == "deit_fast/tuned", name


@each_page
def test_each_name_of_the_package_is_there(page):
    names = re.findall(r"(?<![\w./-])deit_fast((?:\.[A-Za-z_]\w*)+)", page.read_text())
    for name in names:
        found, path = importlib.import_module("deit_fast"), "deit_fast"
        for part in name.split(".")[1:]:
            path += f".{part}"
            # What an extra is needed for is imported by its own name.
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(path)


@each_page
def test_python_blocks_are_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_each_extra_is_declared():
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'pip install (?:-e )?"\.\[(\w+)\]"', (ROOT / "README.md").read_text())
    assert named and set(named) <= set(extras)


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_citation_is_of_this_version():
    import deit_fast

    assert f"\nversion: {deit_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("file", [file for file in FORMS if file.suffix == ".yml"], ids=lambda file: file.name)
def test_the_forms_can_be_read(file):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(file.read_text())["name"]


def test_the_workflow_runs_what_a_person_types():
    assert "run: bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
