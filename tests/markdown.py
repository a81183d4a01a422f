"""Reading the documents: their fenced blocks, tables, headings and links. What is true of them is said in the tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "reference.md"
ROOMS = ("deploy", "docs", "proxy")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.md"))])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Fenced blocks


@dataclass(frozen=True)
class Block:
    """A fenced block. ``not_run`` is the reason that stands above it, if one does."""

    path: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{name_of(self.path)}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    found = re.finditer(
        r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\S*)\n(?P<code>.*?)^```$",
        path.read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    for block in found:
        line = block.string.count("\n", 0, block.start("language")) + 1
        yield Block(path, line, block["language"], block["code"], block["reason"])


# Text and tables


@cache
def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(path: Path, title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{path.name} has no section {title!r}"
    return found[1]


def table(path: Path, title: str) -> list[list[str]]:
    """The cells of the one table of a section, without its head."""
    lines = [line for line in section(path, title).splitlines() if line.startswith("|")]
    # A bar inside of code is written with a backslash before it.
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len(rows) > 2, f"{title!r} has no table"
    assert len({len(row) for row in rows}) == 1, f"a row of {title!r} has more or fewer cells than its head"
    return rows[2:]


def spans(cell: str) -> list[str]:
    """What stands in code spans."""
    return re.findall(r"`([^`]+)`", cell)


def span(cell: str) -> str:
    (found,) = spans(cell)
    return found


def anchors(path: Path) -> set[str]:
    """The names that headings can be linked by."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
