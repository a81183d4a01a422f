"""Many requests at once, to one gateway or two: no limit is ever exceeded."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from proxy.app import running
from proxy.ledger import accounts, reports
from proxy.settings import load
from tests.exchanges.teams import HIGH, Team, asked, request_bytes
from tests.live import JSON, PATIENCE_SECONDS, UPSTREAM_KEY, LiveGateway, json_answer, live_gateway, now, whole


async def post_bare(port: int, wire: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own; the answer's status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(wire)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        return int(head.split(b" ")[1]), await reader.readexactly(length)
    finally:
        writer.close()


def storm(requests: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """All requests, as (port, bytes), at once; their answers in order."""

    async def run() -> list[tuple[int, bytes]]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await asyncio.gather(*(post_bare(port, wire) for port, wire in requests))

    return asyncio.run(run())


@contextmanager
def watched_budgets(gateway: LiveGateway) -> Iterator[list[int]]:
    """Looks at all budgets again and again from another connection; gives what each look found left, at the least."""
    over = threading.Event()
    least: list[int] = []

    def look() -> None:
        # A pause, or two cores have time for nothing else.
        while not over.wait(0.005):
            with gateway.database.reading() as connection:
                least.append(min(budget.remaining_micro_usd for budget in reports.list_budgets(connection, now())))

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield least
    finally:
        over.set()
        watch.join()


@contextmanager
def replica(gateway: LiveGateway) -> Iterator[int]:
    """A second gateway on the same database; its port."""
    environment = {
        "BEANMETER_UPSTREAM_URL": gateway.upstream_url,
        "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
        "BEANMETER_DATABASE_URL": gateway.database_url,
        "BEANMETER_STATE_DIR": str(gateway.state_dir / "replica"),
    }
    other = running(load(environment, gateway.state_dir), "127.0.0.1", 0)
    base_url = gateway.loop.run(other.__aenter__())
    try:
        yield int(base_url.rpartition(":")[2].removesuffix("/v1"))
    finally:
        gateway.loop.run(other.__aexit__(None, None, None))


def test_200_requests_at_once_with_room_for_37(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream):
        limit = 38 * HIGH - 1
        gateway.set_budget(limit)
        team = Team(gateway, "red", gateway.key)
        with watched_budgets(gateway) as least:
            answers = storm([(gateway.port, request_bytes(team, asked()))] * 200)

        assert Counter(status for status, _ in answers) == {200: 37, 429: 163}
        for error in (json.loads(body)["error"] for status, body in answers if status == 429):
            assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
            for told in ("team's budget of $8.006599 per month", "$0.210699 left", "costs up to $0.210700", "resets at"):
                assert told in error["message"]
        assert len(upstream.requests) == 37
        assert team.budget() == (37 * HIGH, 0)
        assert Counter(charge["state"] for charge in team.charges()) == {"settled": 37}
        assert least
        assert min(least) >= 0
        assert gateway.metric('beanmeter_refusals_total{code="insufficient_quota",team="red"}') == 163


def test_two_replicas_two_teams_and_a_key_never_spend_beyond_any_limit(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream), replica(gateway) as other_port:
        red = Team(gateway, "red", gateway.key)
        first_id, first_key = gateway.add_team("blue")
        with gateway.database.writing() as connection:
            second = accounts.add_key(connection, "blue", now=now(), actor="test")
        blue = [Team(gateway, "blue", key) for key in (first_key, second.key)]
        gateway.set_budget(11 * HIGH)
        gateway.set_budget(10_000 * HIGH, "total")
        gateway.set_budget(19 * HIGH + 5, team="blue")
        gateway.set_budget(7 * HIGH, "day", team="blue", key_id=first_id)
        ports = (gateway.port, other_port)
        with watched_budgets(gateway) as least:
            callers = [red, *blue] * 60
            answers = storm([(ports[place % 2], request_bytes(team, asked())) for place, team in enumerate(callers)])

        forwarded = Counter(team.key for team, (status, _) in zip(callers, answers, strict=True) if status == 200)
        assert forwarded[red.key] == 11
        assert forwarded[first_key] <= 7
        assert forwarded[first_key] + forwarded[second.key] == 19
        assert {status for status, _ in answers} == {200, 429}
        assert len(upstream.requests) == 30
        assert min(least) >= 0
        for port in ports:
            gateway.settle(port)
        with gateway.database.reading() as connection:
            found = {(b.team, b.scope, b.period): b for b in reports.list_budgets(connection, now())}
        spent = {name: (budget.settled_micro_usd, budget.held_micro_usd) for name, budget in found.items()}
        assert spent == {
            ("red", "team", "month"): (11 * HIGH, 0),
            ("red", "team", "total"): (11 * HIGH, 0),
            ("blue", "team", "month"): (19 * HIGH, 0),
            ("blue", "key", "day"): (forwarded[first_key] * HIGH, 0),
        }


def test_who_has_its_answer_is_no_longer_open_anywhere(database_url: str, tmp_path: Path) -> None:
    """One request after the other, to two gateways in turns, under a limit of one at a time."""
    with live_gateway(database_url, tmp_path) as (gateway, upstream), replica(gateway) as other_port:
        upstream.answer(whole(200, JSON, json_answer()))
        with gateway.database.writing() as connection:
            accounts.set_limit(connection, "red", None, rpm=None, concurrency=1, now=now(), actor="test")
        ports = (gateway.port, other_port)
        red = Team(gateway, "red", gateway.key)
        answers = [storm([(ports[place % 2], request_bytes(red, asked()))])[0][0] for place in range(20)]
        assert answers == [200] * 20
