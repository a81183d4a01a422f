"""Expressions of PromQL as text, in the form in which Prometheus prints them: made faster, without their comparisons, and
one alternative at a time. Only what the rules and dashboards here use is understood."""

from __future__ import annotations

import re
from collections.abc import Iterator

# So many times faster than they are written: two seconds stand for a minute.
HASTE = 30

# An offset of hours reaches back to before the test began; this does not.
_OFFSET_MS_MAX = 4_000

_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_DURATION = r"(?:\d+(?:ms|[smhdw]))+"


def milliseconds(duration: str) -> int:
    """A duration such as ``1m30s``."""
    return sum(int(number) * _MS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdw])", duration))


def hasten(expression: str) -> str:
    """With windows and offsets that are shorter by as much, and offsets no longer than a test."""

    def window(found: re.Match[str]) -> str:
        return re.sub(_DURATION, lambda one: f"{max(1, milliseconds(one[0]) // HASTE)}ms", found[0])

    def offset(found: re.Match[str]) -> str:
        return f"offset {min(milliseconds(found[1]) // HASTE, _OFFSET_MS_MAX)}ms"

    return re.sub(rf"\boffset ({_DURATION})", offset, re.sub(rf"\[{_DURATION}(:{_DURATION})?\]", window, expression))


def uncompared(expression: str) -> str:
    """An alert's expression without what makes it empty while all is well.

    Each comparison gives 0 or 1 in place of leaving a series out, ``unless`` asks that the other side is there, and
    ``absent`` gives what should be. So a result is left if all its metrics exist and their labels fit each other.
    """
    expression = re.sub(r" (>=|<=|==|!=|>|<) (?!bool )", r" \1 bool ", expression)
    expression = re.sub(r"\bunless\b", "and", expression)
    return re.sub(r"\babsent\((.*)\)", r"\1", expression)


def alternatives(expression: str) -> Iterator[str]:
    """The expression with one side of each ``or``, in every combination: an ``or`` hides a side that is always empty."""
    found = re.search(r"\s+or\s+", expression)
    if found is None:
        yield expression
        return
    begin = _bound(expression, found.start() - 1, -1) + 1
    end = _bound(expression, found.end(), 1)
    for side in (expression[begin : found.start()], expression[found.end() : end]):
        yield from alternatives(f"{expression[:begin]}{side}{expression[end:]}")


def _bound(expression: str, place: int, step: int) -> int:
    """The parenthesis that closes what ``place`` is in, or the end of the expression."""
    depth = 0
    while 0 <= place < len(expression):
        if expression[place] in "()":
            depth += 1 if (expression[place] == "(") == (step == 1) else -1
            if depth < 0:
                break
        place += step
    return place


def chosen(expression: str, variables: dict[str, str]) -> str:
    """A panel's expression with Grafana's variables filled in."""
    return re.sub(r"\$(\w+)", lambda found: variables[found[1]], expression)
