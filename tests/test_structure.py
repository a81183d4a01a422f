"""The shape of the code itself: floors, names, opening words, lock files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import proxy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "proxy"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
LOCK_FILES = sorted(ROOT.glob("requirements*.txt"))

# Names that say nothing of what is inside, so that anything ends up there.
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "managers", "service", "services"}


def floors() -> dict[str, int]:
    """The floor of each room, from the table in the package's own docstring."""
    found: dict[str, int] = {}
    for floor, rooms in re.findall(r"^- floor (\d+): (.+?) --", proxy.__doc__ or "", re.MULTILINE):
        found |= {room.rstrip("/"): int(floor) for room in re.findall(r"``([a-z_/]+)``", rooms)}
    return found


FLOORS = floors()


def room_of(path: Path) -> str:
    """The module or package directly under ``proxy`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module, package: tuple[str, ...]) -> Iterator[str]:
    """The rooms that a module imports from, at its top or anywhere inside. ``package`` is where relative imports start."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module or ""
            base = base.rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            # The package itself holds nothing but its version.
            if top == "proxy" and rest and rest != "__version__":
                yield rest.partition(".")[0]


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def test_the_table_of_floors_is_read() -> None:
    assert FLOORS["money"] == 0
    assert FLOORS["ledger"] == 4
    assert max(FLOORS.values()) == 11


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import proxy.money", ["money"]),
        ("from proxy import money, periods", ["money", "periods"]),
        ("from proxy.ledger.books import reserve", ["ledger"]),
        ("from .books import reserve", ["ledger"]),
        ("from ..money import parse_usd", ["money"]),
        ("from .. import money", ["money"]),
        ("def late():\n    from proxy.app import App", ["app"]),
        ("import json\nfrom proxy import __version__\nfrom proxyish import x", []),
    ],
)
def test_imports_are_found(source: str, rooms: list[str]) -> None:
    assert list(imported_rooms(ast.parse(source), ("proxy", "ledger"))) == rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_the_floors_below_its_own(path: Path) -> None:
    room = room_of(path)
    assert room in FLOORS, f"{room} has no floor: add it to the table in proxy/__init__.py"
    package = ("proxy", *path.relative_to(PACKAGE).parts[:-1])
    for imported in imported_rooms(parse(path), package):
        assert imported == room or FLOORS[imported] < FLOORS[room], f"{path.name} is on floor {FLOORS[room]} with {imported}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_opens_with_what_lives_in_it(path: Path) -> None:
    assert ast.get_docstring(parse(path)), f"{path} needs a docstring that says what lives here, and what may live only here"


def test_no_room_is_named_after_nothing() -> None:
    assert not [path for path in MODULES if EMPTY_NAMES & set(path.relative_to(PACKAGE).with_suffix("").parts)]


def test_every_room_of_the_table_exists() -> None:
    assert {room_of(path) for path in MODULES} == FLOORS.keys()


def test_there_are_four_lock_files() -> None:
    names = ["requirements-build.txt", "requirements-dev.txt", "requirements-full.txt", "requirements.txt"]
    assert [path.name for path in LOCK_FILES] == names


@pytest.mark.parametrize("path", LOCK_FILES, ids=lambda path: path.name)
def test_a_lock_file_pins_everything_by_hash_and_names_no_index(path: Path) -> None:
    text = path.read_text("utf-8")
    assert not re.search(r"--(extra-)?index-url|--find-links|https?://", text)
    requirements = text.replace("\\\n", " ").splitlines()
    assert requirements
    assert all(re.match(r"[a-z0-9-]+(\[[a-z,]+\])?==\S+ .*--hash=sha256:[0-9a-f]{64}", one) for one in requirements)


def test_one_package_has_one_version_in_all_lock_files() -> None:
    versions: dict[str, set[str]] = {}
    for path in LOCK_FILES:
        for name, version in re.findall(r"^([a-z0-9-]+)\S*==(\S+)", path.read_text("utf-8"), re.MULTILINE):
            versions.setdefault(name, set()).add(version)
    assert {name: sorted(found) for name, found in versions.items() if len(found) > 1} == {}
