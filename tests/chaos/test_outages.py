"""The database goes away and comes back, around the hold and around the booking: what is refused was not sent, and what was
sent is booked."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from proxy.ledger.decisions import Booking
from proxy.ledger.journal import Journal, abandoned
from proxy.ledger.teller import FROZEN_SECONDS
from tests.chaos.crew import Crew, crew, fresh_database
from tests.chaos.sizes import FULL, size
from tests.ledger.ledgers import Account, released, reservation, reviewed, settled
from tests.ledger.wire import Cut, Wire
from tests.live import ORDER, live_gateway, wait_for
from tests.postgres import Server

ORDERS = 8


@pytest.mark.postgres
def test_a_server_that_crashes_in_the_middle_of_exchanges(breakable_postgres: Server, tmp_path: Path) -> None:
    with crew(fresh_database(breakable_postgres), tmp_path) as team:
        team.set_budget(10**12)
        # Every exchange is overdue long before the server is back: who lives is given the time to book all the same.
        hasty = replace(
            team.plan(upstream_timeout_seconds="1.5"), grace=timedelta(0), settled_in_seconds=2.5, sweep_seconds=0.05
        )
        for _ in range(size(1, 10)):
            living, dying = team.start(hasty), team.start(hasty)
            urls = [living.base_url, dying.base_url] * (ORDERS // 2)
            before = set(team.charges())
            with team.orders_under_way(urls, 0.6) as answers:
                breakable_postgres.crash()
                assert [answer.result() for answer in answers] == [200] * ORDERS
            sent = len(team.simulator.requests())
            assert [team.order(url) for url in urls[:2]] == ["ledger_unavailable"] * 2
            assert len(team.simulator.requests()) == sent, "what was refused was not sent"
            dying.kill()
            breakable_postgres.start()
            heir = team.start(hasty)
            assert heir.base_url
            states = watch_states(team, before)
            assert states <= {"forwarded", "settled"}, "nobody has to look at what is known"
            assert team.order(living.base_url) == team.order(heir.base_url) == 200
            assert living.stop() == heir.stop() == 0
            assert len(team.audit()) == len(before) + ORDERS + 2


def watch_states(team: Crew, before: set[str]) -> set[str]:
    """The states that new charges are seen in until all of them have ended."""
    seen: set[str] = set()

    def ended() -> bool | None:
        now = {row["state"] for request_id, row in team.charges().items() if request_id not in before}
        seen.update(now)
        return None if now & {"reserved", "forwarded"} else True

    wait_for(ended)
    return seen


@pytest.mark.postgres
def test_a_server_that_freezes(breakable_postgres: Server, tmp_path: Path) -> None:
    """It closes nothing and answers nothing: only the gateway's own patience ends the waiting."""
    with crew(fresh_database(breakable_postgres), tmp_path) as team:
        team.set_budget(10**12)
        gateway = team.start(replace(team.plan(), frozen_seconds=6.0 if not FULL else FROZEN_SECONDS))
        assert team.order(gateway.base_url) == 200
        with team.orders_under_way([gateway.base_url]) as answers:
            with breakable_postgres.frozen():
                # What was sent gets its answer, and its outcome is safe; nothing else is sent.
                assert [answer.result() for answer in answers] == [200]
                assert wait_for(lambda: journaled(team.state_dir) == 1 or None)
                assert [team.order(gateway.base_url) for _ in range(2)] == ["ledger_unavailable"] * 2
                with team.client(gateway.base_url) as client:
                    root = gateway.base_url.removesuffix("/v1")
                    assert client.get(f"{root}/readyz").status_code == 503
                    # The page comes without the figures of the ledger.
                    assert "beanmeter_charges_open{" not in client.get(f"{root}/metrics").text
                assert wait_for(lambda: "ledger_frozen" in gateway.log.read_text() or None)
            assert len(team.simulator.requests()) == 2
        assert wait_for(lambda: team.order(gateway.base_url) == 200 or None)
        assert gateway.stop() == 0
        charges = team.audit()
        assert sorted(row["state"] for row in charges.values() if row["reason"] != "unsent") == ["settled"] * 3
        assert {row["state"] for row in charges.values()} <= {"settled", "released"}


def journaled(state_dir: Path) -> int:
    """How many outcomes are in the journals."""
    return sum(file.read_bytes().count(b'"charge_id":') for file in (state_dir / "journal").glob("*.journal"))


@pytest.mark.postgres
@pytest.mark.parametrize("cut", ["before", "after"])
def test_a_commit_that_is_not_answered(postgres_database: str, tmp_path: Path, cut: Cut) -> None:
    with Wire(postgres_database) as wire, live_gateway(wire.url, tmp_path) as (gateway, upstream):
        gateway.set_budget(10**9, "total")
        assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
        gateway.settle()
        # The hold's commit.
        wire.cut_next_commit(cut)
        refused = gateway.client.post("/images/generations", json=ORDER)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
        assert len(upstream.requests) == 1
        # The next hold's commit is spared, and that of its booking is lost.
        wire.cut_next_commit(cut, spare=1)
        assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
        states = wait_for(lambda: all_ended([row["state"] for row in gateway.charges()]))
        # What was held without anybody's knowing is let go, for nothing was sent.
        assert sorted(states) == (["settled"] * 2 if cut == "before" else ["released", "settled", "settled"])
        budget = gateway.client.get("/budget").json()["budgets"][0]
        assert (budget["settled_micro_usd"], budget["held_micro_usd"]) == (2 * 210_700, 0)


def all_ended(states: list[str]) -> list[str] | None:
    return None if "forwarded" in states else states


def test_a_journal_that_ends_anywhere_is_replayed_up_to_there(tmp_path: Path) -> None:
    """Cut at every byte, as the end of a process or of a disk can leave it."""
    jobs = [reservation(Account("red", 1, "key_1", "")) for _ in range(3)]
    ends = [settled(jobs[0]), reviewed(jobs[1], 5), released(jobs[2])]
    lines = journal_of(tmp_path / "whole", ends).rstrip(b"\0").splitlines(keepends=True)
    assert len(lines) == len(ends)
    written = b"".join(lines)
    place = tmp_path / "cut"
    place.mkdir()
    for cut in range(len(written) + 1):
        complete = sum(len(b"".join(lines[: number + 1])) <= cut for number in range(len(lines)))
        for rest in (b"", bytes(4_096), b"\xff" * 10):
            (place / "1-dead.journal").write_bytes(written[:cut] + rest)
            with abandoned(place) as bookings:
                assert bookings == ends[:complete]
            assert not list(place.iterdir())


def journal_of(place: Path, ends: list[Booking]) -> bytes:
    """The file that a process leaves which dies with these outcomes unbooked."""
    journal = Journal(place)
    journal.write(ends)
    journal.close()
    (path,) = place.iterdir()
    return path.read_bytes()
