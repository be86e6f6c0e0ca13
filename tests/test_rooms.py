"""Who may import whom: a reader follows a call downwards, from room to room, and never back up."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deit_fast"
OF_OTHER_LIBRARIES = ("transformers", "timm", "keras")
LOWER = {
    "kernels": set(),
    "ops": {"kernels"},
    "nn": {"ops"},
    "models": {"nn"},
    "swap": {"nn", "ops"},
    **{library: {"swap", "models", "ops"} for library in OF_OTHER_LIBRARIES},
    # The stand-in driver knows how launches are repeated.
    "check": {"ops", "kernels"},
}
UPPER = ("data", "train", "runtime", "benchmark", "cli")
# Other packages that a room needs; `swap/timm.py`, say, may import timm too: it is imported where timm is there.
THIRD_PARTY = {"kernels": {"torch", "triton"}, "ops": {"torch", "triton"}, "nn": {"torch"}, "swap": {"torch"}}
NOT_INSTALLED = {"reference", "evidence", "bench", "tests"}
# Of the package itself, what every room may have.
COMMON = {"_extras", "__version__"}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imports(file: Path) -> Iterator[str]:
    """The full names that a file imports, at its top or within."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import, which this test does not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """The room that `name` lies in; the package as a whole is "deit_fast"."""
    _, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return part if part in {*LOWER, *UPPER, *COMMON} else "deit_fast"


def arrows(room: str) -> set[tuple[str, str]]:
    """(file, room that it imports) of all that leave `room`."""
    found = {
        (str(file.relative_to(ROOT)), room_of(name))
        for file in files(PACKAGE / room)
        for name in imports(file)
        if name.partition(".")[0] == "deit_fast"
    }
    return {(file, target) for file, target in found if target not in {room, *COMMON}}


def test_every_folder_is_a_room():
    folders = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert folders <= {*LOWER, *UPPER}


@pytest.mark.parametrize("room", LOWER)
def test_a_room_imports_those_below_it_alone(room):
    assert {arrow for arrow in arrows(room) if arrow[1] not in LOWER[room]} == set()


def test_nobody_imports_the_commands():
    others = [*(PACKAGE / room for room in UPPER if room != "cli"), ROOT / "evidence", ROOT / "bench"]
    found = {(file.name, name) for folder in others for file in files(folder) for name in imports(file)}
    assert {(file, name) for file, name in found if f"{name}.".startswith("deit_fast.cli.")} == set()


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_a_room_needs_no_other_package_than_its_own(room):
    found = {
        (str(file.relative_to(PACKAGE / room)), name.partition(".")[0])
        for file in files(PACKAGE / room)
        for name in imports(file)
    }
    known = {"deit_fast", *sys.stdlib_module_names, *THIRD_PARTY[room]}
    if room == "swap":
        # swap/timm.py and swap/transformers/ are imported where these libraries are.
        found = {(file, package) for file, package in found if Path(file).parts[0].removesuffix(".py") != package}
    assert {(file, package) for file, package in found if package not in known} == set()


def test_nobody_is_made_to_import_other_libraries():
    probe = f"import deit_fast, sys; print({set(OF_OTHER_LIBRARIES)} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_what_is_installed_imports_nothing_that_is_not():
    found = {(file.name, name) for file in files(PACKAGE) for name in imports(file)}
    assert {(file, name) for file, name in found if name.partition(".")[0] in NOT_INSTALLED} == set()


def test_checking_prints_nothing():
    calls = (node for file in files(PACKAGE / "check") for node in ast.walk(ast.parse(file.read_text())))
    assert not any(isinstance(node, ast.Name) and node.id == "print" for node in calls)
