"""Draws the picture of the house, docs/pictures/rooms.svg, from the floors in the package's own docstring:
``python -m tests.rooms``."""

from __future__ import annotations

import re
from html import escape

import proxy
from tests.markdown import ROOT

PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"

# Floors up to this one know no file, socket, clock or database.
PURE_MAX = 2

WIDTH = 820
ROW = 38
LEFT = 44
CHARACTER = 8.4

STYLE = """
text { font: 14px ui-monospace, monospace; fill: #1f2328 }
.note { font: 13px system-ui, sans-serif; fill: #59636e }
rect { fill: #eaeef2; stroke: #8c959f }
.pure { fill: #dafbe1; stroke: #4ac26b }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .note { fill: #9198a1 }
  rect { fill: #262c36; stroke: #656c76 } .pure { fill: #12261e; stroke: #2ea043 }
}"""


def floors() -> dict[int, list[str]]:
    """The rooms of each floor, from the ground up."""
    rows = re.findall(r"^- floor (\d+): (.+?) --", proxy.__doc__ or "", re.MULTILINE | re.DOTALL)
    return {int(number): re.findall(r"``([^`]+)``", rooms) for number, rooms in rows}


def drawn() -> str:
    """The picture as SVG: the ground floor at the bottom, a box for each room."""
    house = floors()
    top = max(house)
    height = (top + 1) * ROW + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="The rooms by floor">',
        f"<style>{STYLE}\n</style>",
    ]
    for number, rooms in house.items():
        y = (top - number) * ROW + 8
        parts.append(f'<text x="4" y="{y + 19}" class="note">{number:2}</text>')
        x = float(LEFT)
        for room in rooms:
            width = len(room) * CHARACTER + 20
            pure = ' class="pure"' if number <= PURE_MAX else ""
            parts.append(f'<rect x="{x:g}" y="{y}" width="{width:g}" height="28" rx="5"{pure}/>')
            parts.append(f'<text x="{x + 10:g}" y="{y + 19}">{escape(room)}</text>')
            x += width + 8
        assert x <= WIDTH, f"floor {number} is wider than the picture"
    note = "A file imports only from floors below its own. Green: pure code, which knows no file, socket, clock or database."
    parts += [f'<text x="4" y="{height - 10}" class="note">{note}</text>', "</svg>", ""]
    return "\n".join(parts)


if __name__ == "__main__":
    PICTURE.write_text(drawn(), "utf-8")
