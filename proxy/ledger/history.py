"""What a decision has to know of earlier charges: the pace of a team and its keys, and the use of idempotency keys.

Read inside the transaction that decides, with the teams locked, so that it is exact across all processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from proxy.ledger.decisions import MINUTE, Earlier, Pace, Reservation
from proxy.ledger.statements import Question, instant, read, stamp


class Limit(NamedTuple):
    """How fast and how much at once a team, or one of its keys, may ask."""

    id: int
    team_id: int
    key_id: str | None
    rpm: int | None
    concurrency: int | None


_LATELY = """FROM charges c
    WHERE c.team_id = l.team_id AND (l.key_id IS NULL OR c.key_id = l.key_id) AND c.created_at > :since"""

# Open charges are few among millions, whosever they are. SQLite goes by their index where a condition repeats the index's
# own word for word, and where the team, behind a plus, is none to go by.
_OPEN = """FROM charges c
    WHERE +c.team_id = l.team_id AND (l.key_id IS NULL OR c.key_id = l.key_id)
    AND (c.state = 'reserved' OR c.state = 'forwarded' OR c.state = 'review') AND c.state IN ('reserved', 'forwarded')"""

_PACES = Question(
    {"limits": "bigint[]", "since": "timestamptz"},
    (
        (
            "l.id",
            f"CASE WHEN l.rpm IS NULL THEN 0 ELSE (SELECT count(*) {_LATELY}) END",
            f"CASE WHEN l.rpm IS NULL THEN NULL ELSE (SELECT UTC(min(c.created_at)) {_LATELY}) END",
            f"CASE WHEN l.concurrency IS NULL THEN 0 ELSE (SELECT count(*) {_OPEN}) END",
        ),
        "FROM limits l WHERE l.id IN :limits[]",
    ),
)

_EARLIER = Question(
    {"teams": "bigint[]", "digests": "bytea[]"},
    (
        (
            *("team_id", "HEX(idempotency_digest)", "request_id", "HEX(body_digest)", "state"),
            *("settled_micro_usd", "reserved_micro_usd"),
        ),
        "FROM charges WHERE team_id IN :teams[] AND idempotency_digest IN :digests[] AND state <> 'released'",
    ),
)


def paces_of(driver: Any, limits: Sequence[Limit], now: datetime) -> defaultdict[int, list[Pace]]:
    """What counts against these limits now, by team."""
    found: defaultdict[int, list[Pace]] = defaultdict(list)
    if not limits:
        return found
    (counts,) = read(driver, {"limits": [limit.id for limit in limits], "since": stamp(now - MINUTE)}, _PACES)
    counted = {limit_id: counts for limit_id, *counts in counts}
    for limit in limits:
        recent, oldest, going_on = counted[limit.id]
        found[limit.team_id].append(
            Pace(
                scope="team" if limit.key_id is None else "key",
                key_id=limit.key_id,
                rpm=limit.rpm,
                concurrency=limit.concurrency,
                recent=recent,
                oldest=None if oldest is None else instant(oldest),
                open=going_on,
            )
        )
    return found


def earlier_charges(driver: Any, reservations: Iterable[Reservation]) -> dict[tuple[int, bytes], Earlier]:
    """The charges that hold the reservations' idempotency keys, by team and key digest. None of them is released."""
    wanted = {(job.team_id, job.repeat.key_digest) for job in reservations if job.repeat is not None}
    if not wanted:
        return {}
    team_ids, digests = ({*members} for members in zip(*wanted, strict=True))
    given = {"teams": sorted(team_ids), "digests": sorted(digests)}
    (found,) = read(driver, given, _EARLIER)
    return {
        (team_id, bytes.fromhex(digest)): Earlier(request_id, bytes.fromhex(body_digest), state, settled, reserved)
        for team_id, digest, request_id, body_digest, state, settled, reserved in found
    }
